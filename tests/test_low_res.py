"""Upscalers: noise conditioning augmentation against MONAI's own networks and schedulers in float64."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.networks.schedulers.ddim import DDIMScheduler
from monai.networks.schedulers.ddpm import DDPMScheduler
from upscaler_bundles import LEVELS, TUTORIAL_BETAS, export_upscaler

from volcast.__main__ import app
from volcast.export.bundle import Bundle, read_bundle
from volcast.export.similarity import relative_l2
from volcast.export.verification import VOLUME
from volcast.export.verify import verify
from volcast.runtime.artifact import read_artifact
from volcast.runtime.low_res import NOISE_STEP
from volcast.runtime.noise import request_noise
from volcast.runtime.pipeline import Model, load
from volcast.runtime.spec import ArtifactSpec
from volcast.runtime.volume import Volume, centred_affine

RNG = np.random.default_rng(0)
LOW_RES = RNG.random((1, 8, 12, 8), np.float32)
SEED = 5
COARSE, FINE = (1.0, 1.5, 2.0), (0.5, 0.75, 1.0)
"""Voxels of the low-resolution image and of the samples."""


@pytest.fixture(scope="module")
def exported(shared_folder: Any) -> Any:
    """`exported(dims, told)`: where `export_upscaler` wrote, once for all."""
    return lambda dims, told: shared_folder(
        f"upscaler {dims} {told}", functools.partial(export_upscaler, dims=dims, told=told)
    )


def monai_upscales(bundle: Bundle, low_res: np.ndarray, level: int, samples: range, steps: int) -> np.ndarray:
    """The tutorial's loop in float64, on volcast's noise: the image is noised once, and beside the latent ever after."""
    unet, autoencoder = bundle.unet.double(), bundle.autoencoder
    assert autoencoder is not None
    scheduler = DDIMScheduler(
        1000, schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    count = len(samples)
    clean = torch.from_numpy(np.repeat(low_res[None], count, 0)).double()
    noise = torch.from_numpy(request_noise(SEED, samples, NOISE_STEP, low_res.shape)).double()
    tau = torch.full((count,), level)
    noisy = DDPMScheduler(1000, **TUTORIAL_BETAS).add_noise(
        original_samples=clean, noise=noise, timesteps=tau
    )
    told = {"class_labels": tau} if unet.num_class_embeds else {}
    z = torch.from_numpy(request_noise(SEED, samples, 0, bundle.latent_shape)).double()
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = unet(x=torch.cat([z, noisy], dim=1), timesteps=torch.Tensor((t,)), **told)
            z, _ = scheduler.step(out, int(t), z)
        return autoencoder.double().decode_stage_2_outputs(z / bundle.scale_factor).numpy()


@pytest.mark.parametrize(
    ("dims", "told"), [(2, False), (3, True)], ids=["2D, not told, as in the tutorial", "3D, told"]
)
def test_an_upscaler_acts_as_monai_s_loop(exported: Any, dims: int, told: bool) -> None:
    folder = exported(dims, told)
    bundle = read_bundle(folder / "bundle")
    image = LOW_RES[..., 0] if dims == 2 else LOW_RES
    given: dict[str, Any] = {"low_res": image, "noise_level": 70}
    found = verify(folder / "artifact", bundle, engine="onnxruntime", threads=1, steps=2, condition=given)
    assert found.passed, found.as_text()

    model = load(folder / "artifact", "onnxruntime", threads=1)
    common: dict[str, Any] = {"steps": 2, "compat": "monai-1.6"}
    volumes = [one.array for one in model.sample_many(2, SEED, batch=2, condition=given, **common)]
    wanted = monai_upscales(bundle, image, 70, range(2), 2)[:, 0]
    # Float32 against float64: what `verify` allows float32 networks of two float32 libraries.
    assert relative_l2(np.stack(volumes), wanted) < VOLUME
    # Each sample has its own noise, whatever the batch, and both the level and the image matter.
    alone = [one.array for one in model.sample_many(2, SEED, condition=given, **common)]
    np.testing.assert_allclose(volumes, alone, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    submitted = model.submit(SEED, sample=1, condition=given, **common).result().array
    model.close()
    np.testing.assert_array_equal(submitted, alone[1])
    assert relative_l2(volumes[0], volumes[1]) > 1e-3
    for other in ({"low_res": image[:, ::-1].copy()}, {"noise_level": 0}):
        changed = next(model.sample_many(1, SEED, condition=given | other, **common)).array
        assert relative_l2(changed, alone[0]) > 1e-3, other


def test_without_a_class_embedding_the_level_goes_into_the_noise_alone(exported: Any) -> None:
    told, not_told = (read_artifact(exported(*one) / "artifact") for one in ((3, True), (2, False)))

    def takes(spec: ArtifactSpec, program: str) -> set[str]:
        return (
            {tensor.name for tensor in spec.programs[program].inputs} if program in spec.programs else set()
        )

    assert "tau" in takes(told, "prepare") and "low_res" in takes(told, "step")
    assert "tau" not in takes(not_told, "prepare") | takes(not_told, "step") and "low_res" in takes(
        not_told, "step"
    )
    texts = [spec.conditions[-1].fields[0].description for spec in (told, not_told)]
    assert (
        "the network is told" in texts[0] and "the network is not told, it has no class embedding" in texts[1]
    )
    assert told.provenance["noise_level"] == "0..350 (config), 20 unless asked (assumed)"


@pytest.fixture(scope="module")
def folder(exported: Any) -> Path:
    return exported(3, True)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder / "artifact", "onnxruntime", threads=1)


def test_the_noise_level_is_20_unless_asked(model: Model) -> None:
    volumes = [model.sample(steps=1, condition={"low_res": LOW_RES, **level}).array
               for level in ({}, {"noise_level": 20})]  # fmt: skip
    np.testing.assert_array_equal(*volumes)


def test_the_sample_has_the_low_resolution_image_s_field_of_view(model: Model) -> None:
    turned = np.array([[0, -1.5, 0, 40], [1.0, 0, 0, -7], [0, 0, 2.0, 9], [0, 0, 0, 1]])
    image = Volume(LOW_RES[0], turned, COARSE)
    volume = model.sample(steps=1, condition={"low_res": image})
    assert volume.spacing_mm == FINE and volume.array.shape == (16, 24, 16)
    for corner in ((0, 0, 0), (0, 1, 0), (1, 1, 1)):
        fine, coarse = (np.array([c * size - 0.5 for c, size in zip(corner, shape, strict=True)] + [1])
                        for shape in ((16, 24, 16), (8, 12, 8)))  # fmt: skip
        np.testing.assert_allclose(volume.affine @ fine, turned @ coarse, atol=1e-12)


def test_the_latent_takes_the_image_s_size_and_weights_sweep(model: Model) -> None:
    smaller = LOW_RES[:, :6, :10, :4]
    assert model.sample(steps=1, condition={"low_res": smaller}).array.shape == (12, 20, 8)
    given: dict[str, Any] = {"condition": {"low_res": smaller}, "negative": {"noise_level": 350}, "steps": 1}
    swept = [one.array for one in model.sample_many(2, guidance=[1, 3], batch=2, **given)]
    # Both branches see the same noise, so weight 1 is the conditional branch.
    alone = [one.array for one in model.sample_many(2, condition={"low_res": smaller}, steps=1)]
    np.testing.assert_allclose(swept[::2], alone, atol=1e-5 * np.abs(alone).max(), rtol=0)
    assert relative_l2(swept[1], swept[0]) > 1e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "low_res is missing: give a float32 array of shape"),
        ({"low_res": LOW_RES, "noise_level": 351}, r"noise_level=351: need 0\.\.350"),
        ({"low_res": LOW_RES, "noise_level": 2.5}, "noise_level=2.5: need a whole number"),
        ({"low_res": LOW_RES[:, :7]}, r"\[low_res\] d0=7: need .*crop, pad or resample the image"),
        ({"low_res": np.concatenate([LOW_RES, LOW_RES])}, r"low_res has shape \(2, 8, 12, 8\): need \(1, d0"),
        ({"low_res": LOW_RES[0, 0]}, r"low_res has shape \(12, 8\)"),
        ({"low_res": LOW_RES * np.nan}, "low_res holds NaN"),
        ([{"low_res": LOW_RES}, {"low_res": LOW_RES[:, :6]}], "axis d0 is 8 here"),
    ],
)  # fmt: skip
def test_what_is_refused(model: Model, given: Any, message: str) -> None:
    count = len(given) if isinstance(given, list) else 1
    with pytest.raises(ValueError, match=message) as caught:
        model.sample_many(count, condition=given)
    assert "\n" not in str(caught.value)


def test_from_a_nifti_file(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    affine = centred_affine((8, 12, 8), COARSE)
    path = tmp_path / "low.nii.gz"
    Volume(LOW_RES[0], affine, COARSE).save(path)
    output = tmp_path / "out.nii.gz"
    common = [
        "sample",
        str(folder / "artifact"),
        "-o",
        str(output),
        "--steps",
        "1",
        "-q",
        "-c",
        f"low_res=@{path}",
    ]
    assert app([*common, "-c", "noise_level=10"]) == 0
    image = nibabel.load(output)
    assert image.header.get_zooms() == FINE and image.shape == (16, 24, 16)
    np.testing.assert_allclose(image.affine, centred_affine((16, 24, 16), FINE))
    Volume(LOW_RES[0], centred_affine((8, 12, 8), FINE), FINE).save(path)
    assert app(common) == 2
    assert "voxels of 0.5 x 0.75 x 1 mm: the model has 1 x 1.5 x 2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_noise_level": 1000}, r"max_noise_level=1000: need a whole number of 0\.\.999"),
        ({"max_noise_level": LEVELS}, r"UNet knows levels 0\.\.399 \(num_class_embeds\)"),
        ({"noise_level": 351}, r"noise_level=351: need a whole number of 0\.\.350"),
        ({"low_res_scheduler": "nothing"}, "low_res_scheduler='?nothing'?: need the key of a scheduler"),
        ({"low_res_scheduler": {"_target_": "RFlowScheduler"}}, "RFlowScheduler has no noise levels"),
        ({"network_def#in_channels": 2}, "in_channels=2 leave no room for a low-resolution image"),
    ],
)
def test_bundles_that_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_bundle(folder / "bundle", settings=settings)
    assert "\n" not in str(caught.value)


def test_the_scheduler_of_the_model_may_noise_the_image_too(folder: Path) -> None:
    bundle = read_bundle(folder / "bundle", settings={"low_res_scheduler": "noise_scheduler"})
    assert bundle.low_res is not None
    assert bundle.low_res.noise_schedule == bundle.scheduler.noise_schedule
    assert read_artifact(folder / "artifact").low_res != bundle.low_res


def test_an_image_in_hounsfield_units_comes_to_the_network_s_intensities(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "artifact", tmp_path / "ct")
    manifest = json.loads((tmp_path / "ct" / "manifest.json").read_text())
    manifest["intensity"] = {"network": [0, 1], "written": [-1000, 1000], "unit": "HU"}
    (tmp_path / "ct" / "manifest.json").write_text(json.dumps(manifest))
    quarters = np.round(LOW_RES * 4) / 4  # whole in float32, both ways
    own, ct = (load(one, "onnxruntime", threads=1) for one in (folder / "artifact", tmp_path / "ct"))
    volume = own.sample(steps=1, condition={"low_res": quarters}).array
    units = ct.sample(steps=1, condition={"low_res": quarters * 2000 - 1000}).array
    np.testing.assert_allclose(units, np.clip(volume, 0, 1) * 2000 - 1000, atol=1e-3)
