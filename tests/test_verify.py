"""`volcast verify` on the bundled model: it passes, and each kind of fault is found and named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from volcast.__main__ import app
from volcast.export.bundle import Bundle, read_bundle
from volcast.export.verification import Verification
from volcast.export.verify import verify
from volcast.runtime.artifact import digests
from volcast.runtime.default_artifact import BUNDLE

Change = Callable[[int, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(BUNDLE)


@pytest.fixture
def altered(default_artifact_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """`alter(program, change, **manifest)`: a copy with `change(i, weight)` for the i-th weight of two or more axes,
    its digests made anew: a well-formed artifact of another network.
    """

    def alter(program: str, change: Change, **manifest: object) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(default_artifact_folder, folder, dirs_exist_ok=True)
        model = onnx.load(folder / f"{program}.onnx")
        weights = [
            t for t in model.graph.initializer if len(t.dims) > 1 and t.data_type == onnx.TensorProto.FLOAT
        ]
        assert weights
        for index, weight in enumerate(weights):
            changed = change(index, numpy_helper.to_array(weight)).astype(np.float32)
            weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
        onnx.save(model, folder / f"{program}.onnx")
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **manifest, "files": digests(folder)}))
        return folder

    return alter


def failed(found: Verification) -> list[str]:
    return [check.name for check in found.checks if not check.passed]


def bfloat16(index: int, weight: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even, as stored in bf16."""
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    return bits.astype(np.uint32).view(np.float32)


def test_the_bundled_model_passes(default_artifact_folder: Path, capfd) -> None:
    assert app(["verify", str(default_artifact_folder), "--json", "--condition", "anterior=0.8"]) == 0
    out, _ = capfd.readouterr()
    data = json.loads(out)
    assert data["passed"] is True and data["verdict"] == "passed" and "50 ddim steps" in data["subject"]
    checks = {check["name"]: check for check in data["checks"]}
    networks = [name for name in checks if name.startswith("network, ")]
    assert [name.split()[2] for name in networks] == ["1,", "9,", "17,", "25,", "34,", "42,", "50,"]
    assert {"decode", "encode, mean", "encode, deviation"} < checks.keys()
    # Not merely within the budget: float32 against float32 is a few 1e-6 here, and never 0 by accident.
    assert all(1e-9 < checks[name]["value"] < 1e-5 for name in [*networks, "decode", "volume"])


def test_guidance_and_another_engine(default_artifact_folder: Path, bundle: Bundle) -> None:
    seen: list[tuple[int, int]] = []
    found = verify(
        default_artifact_folder,
        bundle,
        engine="onnxruntime",
        threads=1,
        steps=3,
        seed=2**63,
        condition={"posterior": 0.9},
        guidance=2.0,
        on_step=lambda done, total: seen.append((done, total)),
    )
    assert found.passed, found.as_text()
    assert "onnxruntime" in found.subject and "guidance 2" in found.subject
    assert seen == [(done, 6) for done in range(1, 7)]


def test_one_altered_weight_is_found_and_named(altered: Callable[..., Path], capfd) -> None:
    """1 % on the last convolution, 64 to 4 channels, is 1 % of the network's output."""
    folder = altered("step", lambda i, weight: 1.01 * weight if weight.shape[:2] == (4, 64) else weight)
    assert app(["verify", str(folder), str(BUNDLE), "--steps", "3"]) == 1
    out = capfd.readouterr().out
    lines = [line for line in out.splitlines() if line.endswith("FAIL")]
    assert [line.split()[0] for line in lines] == ["network,"] * 3 + ["volume"]
    assert "FAILED: network, step 1, t=999, network, step 2" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("program", "names"),
    [
        ("schedule", {"network, step 1, t=999", "volume"}),
        ("prepare", {"network, step 1, t=999", "volume"}),
        ("decode", {"decode", "volume"}),
        ("encode", {"encode, mean", "encode, deviation"}),
    ],
)
def test_each_program_is_compared(altered, bundle: Bundle, program: str, names: set[str]) -> None:
    folder = altered(program, lambda i, weight: 1.05 * weight)
    found = verify(folder, bundle, engine="onnxruntime", threads=1, steps=1)
    assert set(failed(found)) == names, found.as_text()


@pytest.mark.parametrize("program", ["step", "decode"])
def test_nan_fails(altered, bundle: Bundle, program: str) -> None:
    folder = altered(program, lambda i, weight: np.where(i == 0, np.nan, weight))
    found = verify(folder, bundle, engine="onnxruntime", threads=1, steps=1)
    assert "volume" in failed(found) and "not finite" in found.verdict
    assert ("decode" in failed(found)) == (program == "decode")
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["checks"][-1]["value"] is None


def test_rounded_weights_have_their_own_budget(altered, bundle: Bundle) -> None:
    """The weights of step as bf16 has them: fine for an artifact that says so, not for one that says fp32."""
    given = {"engine": "onnxruntime", "threads": 1, "steps": 2}
    found = verify(altered("step", bfloat16, precision="bf16"), bundle, **given)
    assert found.passed, found.as_text()
    similar = next(check for check in found.checks if check.name == "volume, MS-SSIM")
    # MONAI's metric is a float32 product of three means of ratios: a rounding or two above 1 for volumes this close.
    assert 0.99 < similar.value < 1 + 4 * np.finfo(np.float32).eps
    assert max(check.value for check in found.checks if check.name.startswith("network")) > 1e-4
    found = verify(altered("step", bfloat16, precision="fp32"), bundle, **given)
    assert not found.passed


def test_other_weights_are_another_model(default_artifact_folder: Path, tmp_path: Path, capfd) -> None:
    state = load_file(BUNDLE / "models" / "unet.safetensors")
    save_file({key: 1.02 * value for key, value in state.items()}, tmp_path / "unet.safetensors")
    weights = f"unet={tmp_path / 'unet.safetensors'}"
    given = [str(default_artifact_folder), str(BUNDLE), "--weights", weights]
    assert app(["verify", *given, "--steps", "1", "--engine", "onnxruntime"]) == 1
    verdict = capfd.readouterr().out.splitlines()[-1]
    assert verdict.startswith("FAILED: weight files that differ (the artifact's unet came from other")
    assert "network, step 1" in verdict


def test_another_schedule_is_found(default_artifact_folder: Path, bundle: Bundle) -> None:
    other = replace(bundle, scheduler=bundle.scheduler.model_copy(update={"steps_offset": 1}))
    found = verify(default_artifact_folder, other, engine="onnxruntime", threads=1, steps=3)
    assert failed(found)[0] == "timesteps that differ"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "latent_shape=[4,8,8,8]"], "latent_shape: [4, 8, 12, 8] in the artifact"),
        (["--set", "autoencoder=null"], "autoencoder: True in the artifact"),
        (["--steps", "0"], "steps=0: need 1..1000"),
        (["--condition", "anterio=1"], "did you mean 'anterior'"),
        (["--guidance", "-1"], "guidance=-1"),
        (["--seed", "-1"], "seed=-1"),
    ],
)
def test_bad_input(default_artifact_folder: Path, capfd, arguments, message: str) -> None:
    assert app(["verify", str(default_artifact_folder), str(BUNDLE), *arguments]) == 2
    out, err = capfd.readouterr()
    assert not out and message in err.splitlines()[-1]


def test_a_bundle_with_another_condition(default_artifact_folder: Path, tmp_path: Path, capfd) -> None:
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    (tmp_path / "bundle" / "configs" / "volcast.json").unlink()
    given = [str(default_artifact_folder), str(tmp_path / "bundle"), "--set", "context_tokens=2"]
    assert app(["verify", *given]) == 2
    assert "conditions: context float32[1,3] in the artifact" in capfd.readouterr().err.splitlines()[-1]


def test_an_artifact_of_another_model(gaussian: Path, capfd) -> None:
    assert app(["verify", str(gaussian), str(BUNDLE)]) == 2
    assert "in the artifact 'gaussian'" in capfd.readouterr().err
