"""Networks that make an image in one pass: MONAI's Generator (mednist_gan) and SPADENet, against MONAI in float64."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from generator_bundles import LABELS, mednist_gan, spade_gan
from torch.nn import functional

from volcast.__main__ import app
from volcast.export.generator_artifact import export_generator
from volcast.export.generator_bundle import has_generator, read_generator
from volcast.export.generator_verify import verify_generator
from volcast.runtime.artifact import read_artifact, read_manifest
from volcast.runtime.generator_spec import GeneratorSpec
from volcast.runtime.noise import request_noise
from volcast.runtime.pipeline import load
from volcast.runtime.volume import Volume

BUDGET = 1e-4
"""`verification.STEP`: float32 sums in another order."""
CASES: dict[str, dict[str, Any]] = {
    "2D": {"dims": 2},
    "3D": {"dims": 3},
    "2D, bilinear, image of two channels": {
        "dims": 2, "upsampling_mode": "bilinear", "out_channels": 2, "last_act": None, "act": ["LEAKYRELU", {"negative_slope": 0.1}],
    },
    "2D, no VAE": {"dims": 2, "is_vae": False, "z_dim": None},
}  # fmt: skip


def relative(result: np.ndarray, wanted: torch.Tensor) -> float:
    exact = wanted.double().numpy()
    assert np.linalg.norm(exact) > 0.1, "the network makes nothing: this test would prove nothing"
    return float(np.linalg.norm(result - exact) / np.linalg.norm(exact))


def labels(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, len(LABELS), shape)


@pytest.fixture(scope="session")
def gan(shared_folder: Any) -> Path:
    """The zoo's GAN under `bundle`, exported under `artifact`."""

    def make(folder: Path) -> None:
        mednist_gan(folder / "bundle")
        export_generator(read_generator(folder / "bundle"), folder / "artifact")

    return shared_folder("gan", make)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_gan_of_the_zoo(gan: Path, engine: str) -> None:
    spec = read_manifest(gan / "artifact")
    assert isinstance(spec, GeneratorSpec)
    assert (spec.noise_shape, spec.image_shape) == ((64,), (1, 64, 64))
    network = read_generator(gan / "bundle").network.double()
    model = load(gan / "artifact", engine, threads=1)
    volumes = [volume.array for volume in model.sample_many(3, seed=5, batch=2)]
    noise = request_noise(5, range(3), 0, (64,))
    with torch.no_grad():
        wanted = torch.sigmoid(network(torch.from_numpy(noise).double()))
    assert relative(np.stack(volumes)[:, None], wanted) < BUDGET
    # Sample 1 of seed 5, whatever the batch.
    alone = list(model.sample_many(2, seed=5))[1].array
    np.testing.assert_allclose(alone, volumes[1], rtol=0, atol=1e-5)
    assert np.abs(volumes[0] - volumes[1]).max() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_spade_networks(tmp_path: Path, case: str) -> None:
    network = spade_gan(tmp_path / "bundle", **CASES[case]).double()
    bundle = read_generator(tmp_path / "bundle")
    spec = export_generator(bundle, tmp_path / "artifact", batch=(1, 2))
    shape = bundle.image_shape[1:]
    model = load(tmp_path / "artifact", "onnxruntime", threads=1)
    mask, other = labels(*shape), labels(*shape)[::-1]
    volumes = model.sample_many(2, seed=3, batch=2, condition=[{"mask": mask}, {"mask": other}])
    got = np.stack([volume.array.reshape(bundle.image_shape) for volume in volumes])
    channels = functional.one_hot(torch.from_numpy(np.stack([mask, other])), 6).movedim(-1, 1).double()
    noise = (
        torch.from_numpy(request_noise(3, range(2), 0, bundle.noise_shape)).double()
        if bundle.noise_shape
        else None
    )
    with torch.no_grad():
        wanted = network.decode(channels, noise)
    assert relative(got, wanted) < BUDGET
    assert np.abs(got[0] - got[1]).max() > 1e-3
    # What depends on the label map alone has left `decode`.
    assert "mask" not in {tensor.name for tensor in spec.programs["decode"].inputs}

    if "encode" in spec.programs:
        image = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
        with torch.no_grad():
            mean, log_variance = network.encoder(torch.from_numpy(image)[None, None].double())
        for found, exact in zip(model.encode(image), (mean, torch.exp(0.5 * log_variance)), strict=True):
            assert relative(found, exact) < BUDGET
        with torch.no_grad():
            styled = network.decode(channels[:1], mean + torch.exp(0.5 * log_variance) * noise[:1])
        got = model.sample(3, condition={"mask": mask}, image=image).array.reshape(1, *bundle.image_shape)
        assert relative(got, styled) < BUDGET
    else:
        with pytest.raises(ValueError, match=r"\[encode\] .* has no encoder of styles"):
            model.sample(condition={"mask": mask}, image=np.zeros(shape))


def test_verify_finds_another_network(gan: Path, tmp_path: Path) -> None:
    bundle = read_generator(gan / "bundle")
    found = verify_generator(gan / "artifact", bundle, engine="onnxruntime", threads=1, seed=2)
    assert found.passed, found.as_text()
    bundle.network.linear.weight.data[0, 0] += 1
    assert not verify_generator(gan / "artifact", bundle, engine="onnxruntime", threads=1).passed
    spade_gan(tmp_path / "bundle", 2)
    with pytest.raises(ValueError, match=r"\[verify\] noise_shape of the artifact"):
        verify_generator(gan / "artifact", read_generator(tmp_path / "bundle"))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spade_gan(tmp_path / "bundle", 3)
    folder, out = tmp_path / "artifact", tmp_path / "out.nii.gz"
    assert app(["export", str(tmp_path / "bundle"), "-o", str(folder), "--batch", "1:2"]) == 0
    mask = Volume(labels(16, 32, 8).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]), (2.0, 2.0, 2.0))
    mask.save(tmp_path / "label.nii.gz")
    style = Volume(
        np.random.default_rng(3).standard_normal((16, 32, 8)).astype(np.float32), mask.affine, (2.0, 2.0, 2.0)
    )
    style.save(tmp_path / "style.nii.gz")
    given = ["--mask", str(tmp_path / "label.nii.gz"), "--image", str(tmp_path / "style.nii.gz")]
    assert (
        app(["sample", str(folder), "-o", str(out), "--engine", "onnxruntime", "--threads", "1", *given]) == 0
    )
    written = nibabel.load(out)
    assert written.shape == (16, 32, 8) and np.array_equal(written.affine, mask.affine)
    arguments = [
        str(folder),
        str(tmp_path / "bundle"),
        "--engine",
        "onnxruntime",
        "-c",
        f"mask=@{tmp_path / 'label.nii.gz'}",
    ]
    assert app(["verify", *arguments]) == 0
    assert app(["info", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "one pass: noise 5 to an image 1 x 16 x 32 x 8" in told and "passed" in told
    refused = {
        ("sample", str(folder), "--steps", "3", "--guidance", "2"): "--steps, --guidance: bundle makes an image in one pass",
        ("sample", str(folder), "--steps", "0", "--guidance", "0"): "--steps, --guidance: bundle makes",
        ("sample", str(folder)): "mask is missing: give a int64 label map",
        ("sample", str(folder), "-c", f"mask=@{tmp_path / 'small.nii.gz'}"): "the whole (16, 32, 8)",
        ("verify", str(folder), str(tmp_path / "bundle"), "--steps", "3"): "--steps: bundle makes an image in one pass",
        ("verify", str(folder)): "[verify] BUNDLE: give the bundle",
        ("generate", str(folder), "--out", str(tmp_path / "set"), "--num", "1", "--steps", "3"): "steps: bundle makes an image in one pass; known: none",
        ("likelihood", str(folder), str(tmp_path / "style.nii.gz")): "[likelihood] bundle makes an image in one pass and has no log p",
        ("quantize", str(folder), "-o", str(tmp_path / "int8")): "makes an image in one pass",
        ("pack", str(folder), "-o", str(tmp_path / "pack.tar")): "makes an image in one pass",
        ("build", str(folder), "--target", "cuda"): "makes an image in one pass",
        ("export", str(tmp_path / "bundle"), "-o", str(tmp_path / "b"), "--controlnet", "x"): "--controlnet: ",
    }  # fmt: skip
    Volume(mask.array[:8].copy(), mask.affine, mask.spacing_mm).save(tmp_path / "small.nii.gz")
    for command, words in refused.items():
        assert app(list(command)) == 2, command
        error = capsys.readouterr().err
        assert (
            words.replace("the whole (16, 32, 8)", "the whole (16, 32, 8)").replace(
                "model makes", "bundle makes"
            )
            in error
        ), (command, error)


def test_bad_input(gan: Path) -> None:
    with pytest.raises(ValueError, match=r"\[load\] engine='cuda': .* makes an image in one pass"):
        load(gan / "artifact", "cuda")
    with pytest.raises(ValueError, match=r"\[load\] memory_limit: "):
        load(gan / "artifact", memory_limit="1GiB")
    with pytest.raises(
        ValueError,
        match="makes an image in one pass: sample, serve, generate, verify and info take it, give a diffusion",
    ):
        read_artifact(gan / "artifact")
    model = load(gan / "artifact", "onnxruntime", threads=1)
    for arguments, words in (
        ({"n": 0}, "n=0"), ({"n": 65, "batch": 65}, "batch=65"), ({"n": 1, "seed": -1}, "seed=-1"),
        ({"n": 2, "condition": [{}]}, "1 conditions for 2 samples"), ({"n": 1, "condition": {"mask": 1}}, "unknown name 'mask'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model.sample_many(**arguments)


def test_where_the_weights_lie(tmp_path: Path) -> None:
    """CheckpointSaver's file of one network alone has no key; a file of one's own replaces the config's."""
    network = mednist_gan(tmp_path / "bundle", wrapped=False)
    found = read_generator(tmp_path / "bundle").network
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), found.parameters(), strict=True))
    own = (tmp_path / "bundle" / "models" / "model.pt").rename(tmp_path / "own.pt")
    assert (
        read_generator(tmp_path / "bundle", weights={"generator": own}).provenance["generator_file"]
        == "own.pt"
    )
    with pytest.raises(ValueError, match=r"model\.pt: no such file"):
        read_generator(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ckpt_path": "/etc/passwd"}, "names no weight file of it inside .*--weights generator=FILE"),
        ({"handlers": None}, "names no weight file"),
        ({"network_def#strides": [2, 2]}, "the config does not describe this file"),
        ({"network_def#act": 3}, r"network_def#act=3: need str \| tuple"),
        ({"network_def#latent_shape": 0}, "latent_shape"),
        ({"generator": "other"}, r"--set generator=KEY"),
        ({"postprocessing#transforms#0#softmax": True}, "a sigmoid alone is known"),
    ],
)
def test_bundles_that_are_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    mednist_gan(tmp_path / "bundle")
    with pytest.raises(ValueError, match=words) as caught:
        read_generator(tmp_path / "bundle", settings=settings)
    assert "\n" not in str(caught.value)


def test_which_configs_are_one_pass(gan: Path, make_config: Callable[[str], Path]) -> None:
    assert has_generator(gan / "bundle", None)
    assert not has_generator(make_config("mednist_ddpm"), None)


@pytest.fixture
def make_config() -> Callable[[str], Path]:
    configs = Path(__file__).parent / "configs"
    return lambda name: next(configs.glob(f"{name}.[jy]*"))


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/examples/one_pass.py on a network of random weights; its picture in docs is a trained one's."""
    spade_gan(tmp_path / "bundle", 2, label_nc=3, labels=["background", "anterior", "posterior"])
    script = Path(__file__).parents[1] / "docs" / "examples" / "one_pass.py"
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path / "bundle"), str(tmp_path / "out")])
    runpy.run_path(str(script), run_name="__main__")
    model = load(tmp_path / "out" / "artifact")
    images = [
        np.asarray(nibabel.load(tmp_path / "out" / f"image_{i}.nii.gz").dataobj)[..., 0] for i in range(4)
    ]
    mask = runpy.run_path(str(script))["label_map"]((16, 32))
    assert set(np.unique(mask)) == {0, 1, 2}
    styled = model.sample(1, condition={"mask": mask[:, ::-1]}, image=images[0]).array
    np.testing.assert_allclose(images[3], styled, rtol=0, atol=1e-5 * np.abs(styled).max())
    assert (tmp_path / "out" / "one_pass.png").stat().st_size > 500
