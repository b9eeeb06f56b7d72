"""`volcast verify --against`: what an artifact lost against the float32 one, and what it refuses to compare."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import volcast
from volcast.__main__ import app
from volcast.export.fidelity import fidelity
from volcast.export.frechet import frechet
from volcast.export.quantize import quantize
from volcast.export.similarity import ms_ssim, psnr
from volcast.runtime.artifact import digests
from volcast.runtime.default_artifact import BUNDLE

FEW = {"engine": "onnxruntime", "threads": 1, "samples": 4, "steps": 3}


@pytest.fixture
def altered(gaussian: Path, tmp_path: Path) -> Callable[..., Path]:
    """`alter(factor, **manifest)`: the decoded images times 1 + factor on every other voxel, under another manifest."""

    def alter(factor: float, **manifest: object) -> Path:
        folder = Path(shutil.copytree(gaussian, tmp_path / f"altered {factor}"))
        model = onnx.load(folder / "decode.onnx")
        resize = model.graph.node[-1]
        resize.output[0] = "whole"
        pattern = 1 + factor * (np.indices((1, 1, 8, 12, 8)).sum(axis=0) % 2)
        model.graph.initializer.append(numpy_helper.from_array(pattern.astype(np.float32), "pattern"))
        model.graph.node.append(onnx.helper.make_node("Mul", ["whole", "pattern"], ["image"]))
        onnx.save(model, folder / "decode.onnx")
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **manifest, "files": digests(folder)}))
        return folder

    return alter


def test_the_numbers_are_those_of_the_volumes(gaussian: Path, altered: Callable[..., Path]) -> None:
    folder = altered(0.001, precision="int8")
    seen: list[tuple[int, int]] = []
    found = fidelity(folder, gaussian, seed=5, on_step=lambda *done: seen.append(done), **FEW)
    given = {"engine": "onnxruntime", "threads": 1}
    ours, theirs = (
        np.stack([each.array for each in volcast.load(path, **given).sample_many(4, 5, steps=3)])[:, None]
        for path in (folder, gaussian)
    )
    values = {check.name: check for check in found.checks}
    alike = [ms_ssim(ours[i : i + 1], theirs[i : i + 1]) for i in range(4)]
    signal = [psnr(ours[i : i + 1], theirs[i : i + 1]) for i in range(4)]
    assert (
        values["MS-SSIM, mean"].value == pytest.approx(np.mean(alike))
        and values["MS-SSIM, mean"].budget == 0.97
    )
    assert values["MS-SSIM, worst"].value == min(alike)
    assert values["PSNR in dB, mean"].value == pytest.approx(np.mean(signal))
    assert values["PSNR in dB, worst"].value == min(signal)
    assert values["Fréchet distance"].value == frechet(ours, theirs)
    assert values["Fréchet distance"].budget == frechet(theirs[:2], theirs[2:])
    assert found.passed and "int8 against fp32" in found.subject and "4 seeds from 5" in found.subject
    assert seen == [(done, 24) for done in range(1, 25)]


def test_a_loss_past_the_budget_is_exit_code_1(gaussian: Path, altered: Callable[..., Path], capfd) -> None:
    folder = altered(0.8, precision="int8")
    given = ["verify", folder, "--against", gaussian, "--engine", "onnxruntime", "--steps", 2, "--samples", 2]
    assert app([*map(str, given), "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    failed = {check["name"] for check in found["checks"] if not check["passed"]}
    assert failed == {"MS-SSIM, mean", "Fréchet distance"} and not found["passed"]
    assert app([*map(str, given)]) == 1
    assert "FAILED: MS-SSIM, mean, Fréchet distance" in capfd.readouterr().out


def test_volumes_that_are_not_finite_fail(gaussian: Path, altered: Callable[..., Path]) -> None:
    found = fidelity(altered(np.nan, precision="fp16"), gaussian, **FEW)
    assert not found.passed and "not finite" in found.verdict


def test_one_seed_has_no_distance_to_other_seeds(gaussian: Path) -> None:
    found = fidelity(gaussian, gaussian, **FEW | {"samples": 1})
    assert found.passed and found.checks[-1].budget is None and found.checks[-1].value < 1e-12


def test_other_source_files_are_another_model(gaussian: Path, altered: Callable[..., Path]) -> None:
    folder = altered(0.0, provenance={"unet_sha256": "a"})
    other = altered(1e-9, provenance={"unet_sha256": "b"})
    found = fidelity(folder, other, **FEW)
    assert "source files that differ (unet came from other files: different models)" in found.verdict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", 0], "[verify] samples=0: need 1..10000"),
        (["--steps", 0], "steps=0: need 1..1000"),
        (["--guidance", -1], "guidance=-1"),
        (["--set", "a=1"], "leave the bundle, --config, --weights, --set and --controlnet out"),
    ],
)
def test_bad_arguments(gaussian: Path, capfd, arguments: list[object], message: str) -> None:
    given = ["verify", gaussian, "--against", gaussian, "--engine", "onnxruntime", *arguments]
    assert app([*map(str, given)]) == 2
    assert message in capfd.readouterr().err


def test_what_cannot_be_compared(gaussian: Path, altered: Callable[..., Path], capfd) -> None:
    assert app(["verify", str(gaussian), str(BUNDLE), "--samples", "2"]) == 2
    assert "--samples is for --against" in capfd.readouterr().err
    half = altered(0.0, precision="fp16")
    with pytest.raises(ValueError, match="against gaussian in fp16: need the float32 artifact"):
        fidelity(gaussian, half, **FEW)
    other = altered(0.1, scale_factor=0.25)
    with pytest.raises(ValueError, match="scale_factor of 'gaussian' and of 'gaussian' differ"):
        fidelity(gaussian, other, **FEW)


def test_the_bundled_model_in_int8(default_artifact_folder: Path, tmp_path: Path, capfd) -> None:
    """End to end, with few samples: also against MONAI, where int8 has a budget for the volume alone."""
    quantize(default_artifact_folder, tmp_path / "int8", samples=2, steps=4, threads=1)
    found = fidelity(
        tmp_path / "int8", default_artifact_folder, threads=1, samples=2, seed=0, steps=4, guidance=2.0
    )
    assert found.passed, found.as_text()
    alike = next(check.value for check in found.checks if check.name == "MS-SSIM, mean")
    assert 0.97 < alike < 0.99999
    assert app(["verify", str(tmp_path / "int8"), str(BUNDLE), "--steps", "4", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capfd.readouterr().out)["checks"]}
    assert checks["decode"]["budget"] is None and checks["volume, MS-SSIM"]["budget"] == 0.97
    # The encoder stays float32 and keeps its budget.
    assert checks["encode, mean"]["budget"] == 1e-4 and checks["encode, mean"]["passed"]
