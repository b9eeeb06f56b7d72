"""MAISI as its bundles have it, narrowed, every weight random: named inputs, 30 steps of rectified flow, a ControlNet that
sees a label map's bits, Hounsfield units; against a loop over MONAI's own networks and RFlowScheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.schedulers.rectified_flow import RFlowScheduler
from zoo_bundles import CONFIGS, Published

from volcast.__main__ import app
from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle
from volcast.export.bundle_maisi import CT, plan_intensity
from volcast.export.bundle_plan import plan_bundle
from volcast.export.verify import verify
from volcast.runtime.artifact import read_artifact
from volcast.runtime.intensity import IntensitySpec, of_network, written
from volcast.runtime.noise import request_noise
from volcast.runtime.pipeline import load

LEVELS = {
    "num_channels": [32, 64],
    "attention_levels": [False, True],
    "num_head_channels": [0, 32],
    "num_res_blocks": 1,
}
AUTOENCODER = {"num_channels": [32, 32, 32], "num_res_blocks": [1, 1, 1]}
SIZE = (4, 6, 4)
RNG = np.random.default_rng(0)


def narrowed(name: str, values: dict[str, Any], separator: str = "__") -> dict[str, Any]:
    return {f"{name}{separator}{key}": value for key, value in values.items()}


@pytest.fixture(scope="module")
def rflow(make_zoo_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """The zoo's bundle with its ControlNet, and its artifact."""
    root = tmp_path_factory.mktemp("maisi")
    bundle = make_zoo_bundle(
        root, "maisi_rflow", ["controlnet_def"], latent_shape=[4, *SIZE], **narrowed("diffusion_unet_def", LEVELS),
        **narrowed("controlnet_def", LEVELS), **narrowed("autoencoder_def", AUTOENCODER),
    )  # fmt: skip
    # A random decoder's image is spread over 0..1, and past both ends.
    mask = RNG.integers(0, 133, [size * 4 for size in SIZE])
    image = monai_loop(bundle, torch.from_numpy(request_noise(7, range(1), 0, (4, *SIZE))), mask, 30)
    last = bundle.autoencoder.decoder.blocks[-1].conv.conv
    gain = 0.35 / image.std()
    last.weight.data *= gain
    last.bias.data = (last.bias.data - image.mean()) * gain + 0.5
    export_bundle(bundle, root / "artifact", batch=(1, 2))
    return root / "artifact", bundle


def monai_loop(bundle: Bundle, noise: torch.Tensor, mask: np.ndarray, steps: int) -> torch.Tensor:
    """scripts/sample.py of the bundle, in float32: the image before its intensities are scaled."""
    scheduler = RFlowScheduler(
        num_train_timesteps=1000, use_discrete_timesteps=False, use_timestep_transform=True,
        sample_method="logit-normal", scale=1.2,
    )  # fmt: skip
    scheduler.set_timesteps(num_inference_steps=steps, input_img_size_numel=int(np.prod(noise.shape[2:])))
    planes = (
        torch.from_numpy(mask)[None, None]
        .long()
        .bitwise_and(2 ** torch.arange(8).reshape(1, 8, 1, 1, 1))
        .ne(0)
        .float()
    )
    labels, spacing = torch.tensor([1]), torch.tensor([[1.5, 1.5, 2.0]]) * 100
    (control,) = bundle.controls
    ends = torch.cat((scheduler.timesteps[1:], torch.tensor([0.0], dtype=scheduler.timesteps.dtype)))
    x = noise
    with torch.no_grad():
        for t, following in zip(scheduler.timesteps, ends, strict=True):
            now = torch.tensor([float(t)])
            down, middle = control.network(x=x, timesteps=now, controlnet_cond=planes, class_labels=labels)
            flow = bundle.unet(
                x=x, timesteps=now, class_labels=labels, spacing_tensor=spacing, down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            )  # fmt: skip
            x, _ = scheduler.step(flow, t, x, following)
        image: torch.Tensor = bundle.autoencoder.decode_stage_2_outputs(x / bundle.scale_factor)  # type: ignore[union-attr, operator]
    return image


def test_thirty_steps_of_rectified_flow_in_hounsfield_units(
    rflow: tuple[Path, Bundle], tmp_path: Path
) -> None:
    folder, bundle = rflow
    mask = RNG.integers(0, 133, [size * 4 for size in SIZE])
    image = monai_loop(bundle, torch.from_numpy(request_noise(7, range(1), 0, (4, *SIZE))), mask, 30)
    wanted = (torch.clip(image, 0, 1) * 2000 - 1000)[0, 0].numpy()
    share = np.mean((wanted > -999) & (wanted < 999))
    assert 0.2 < share < 0.98, "nothing between the ends, or nothing clipped: this test would prove little"
    np.save(tmp_path / "mask.npy", mask)
    out = tmp_path / "ct.nii.gz"
    given = ["-c", f"mask=@{tmp_path / 'mask.npy'}", "-c", "class_labels=1", "-c", "spacing_2=2"]
    options = ["--seed", "7", "--compat", "monai-1.6", "--engine", "onnxruntime", "--threads", "1", "-q"]
    assert app(["sample", str(folder), "-o", str(out), *given, *options]) == 0
    file = nibabel.load(out)
    volume = np.asarray(file.dataobj)
    # verification.VOLUME (1e-3 of the image's norm, after as many steps), and a clipped intensity is the end itself.
    assert np.linalg.norm(volume - wanted) < 1e-3 * np.linalg.norm(wanted + 1000)
    assert volume.min() == -1000 and volume.max() == 1000
    assert (volume.round().astype(np.int16) == volume.round()).all()
    assert file.header.get_zooms() == (1.5, 1.5, 1.5)


def test_verify_and_the_way_back_into_the_network(rflow: tuple[Path, Bundle]) -> None:
    folder, bundle = rflow
    mask = RNG.integers(0, 133, [size * 4 for size in SIZE])
    condition = {"mask": mask, "class_labels": 1}
    found = verify(folder, bundle, engine="onnxruntime", threads=1, steps=2, condition=condition)
    assert found.passed, found.as_text()
    model = load(folder, "onnxruntime", threads=1)
    volume = model.sample(steps=1, condition=condition)
    with torch.no_grad():
        image = torch.from_numpy((volume.array + 1000) / 2000)[None, None]
        wanted = bundle.autoencoder.encode(image)[0].numpy() * bundle.scale_factor  # type: ignore[union-attr, operator]
    assert np.abs(model.encode(volume) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_the_ddpm_bundle_s_regions_and_the_mask_generator(tmp_path: Path, generative_keys: Any) -> None:
    """The tutorials' config: one-hot regions times 100, and MAISI's second pair of networks."""
    size = {"latent_shape": [4, 4, 4, 4], "spacing_mm": [2.0, 2.0, 2.5], "scale_factor": 0.9}
    settings = (
        size | narrowed("diffusion_unet_def", LEVELS, "#") | narrowed("autoencoder_def", AUTOENCODER, "#")
    )
    bundle = Published(config="maisi_ddpm", settings=settings).read(tmp_path / "image", generative_keys)
    assert bundle.intensity == CT
    fields = {field.name: field.default for condition in bundle.conditions for field in condition.fields}
    assert fields == {
        "top_head": 0, "top_chest": 1, "top_abdomen": 0, "top_pelvis": 0, "bottom_head": 0, "bottom_chest": 0,
        "bottom_abdomen": 1, "bottom_pelvis": 0, "spacing_0": 2, "spacing_1": 2, "spacing_2": 2.5,
    }  # fmt: skip
    export_bundle(bundle, tmp_path / "artifact", batch=(1, 2))
    given = {"top_head": 1, "top_chest": 0, "spacing_0": 1.25}
    found = verify(tmp_path / "artifact", bundle, engine="onnxruntime", threads=1, steps=2, condition=given)
    assert found.passed, found.as_text()
    model = load(tmp_path / "artifact", "onnxruntime", threads=1)
    whole = {"top_region_index_tensor": [100, 0, 0, 0], "spacing_tensor": [125, 200, 250]}
    volumes = [model.sample(steps=1, condition=one).array for one in (given, whole, {})]
    assert np.array_equal(volumes[0], volumes[1]) and not np.array_equal(volumes[0], volumes[2])
    with pytest.raises(ValueError, match=r"top_head=2: need 0\.\.1"):
        model.sample(steps=1, condition={"top_head": 2})

    chosen = {"unet": "mask_generation_diffusion_def", "autoencoder": "mask_generation_autoencoder_def",
              "scheduler": "mask_generation_noise_scheduler"}  # fmt: skip
    levels = {key: value for key, value in LEVELS.items() if key != "num_channels"} | {"channels": [32, 64]}
    settings = size | chosen | narrowed("mask_generation_diffusion_def", levels, "#")
    settings |= narrowed("mask_generation_autoencoder_def", AUTOENCODER, "#")
    masks = Published(config="maisi_ddpm", settings=settings).read(tmp_path / "masks", generative_keys)
    export_bundle(masks, tmp_path / "mask_artifact", batch=(1, 2))
    assert read_artifact(tmp_path / "mask_artifact").intensity is None
    sizes = {"context": RNG.uniform(-1, 1, (1, 10))}
    found = verify(
        tmp_path / "mask_artifact", masks, engine="onnxruntime", threads=1, steps=2, condition=sizes
    )
    assert found.passed, found.as_text()
    volume = load(tmp_path / "mask_artifact", "onnxruntime", threads=1).sample(steps=1, condition=sizes)
    assert volume.array.shape == (125, 16, 16, 16)


def test_intensities() -> None:
    image = np.array([-0.5, 0, 0.25, 1, 7, 1 / 3])
    assert written(CT, image).tolist()[:5] == [-1000, -1000, -500, 1000, 1000]
    assert written(CT, image).dtype == np.float32 and np.array_equal(
        written(None, image), image.astype(np.float32)
    )
    # Half a step of float32 at 1000.
    back = of_network(CT, written(CT, image))
    np.testing.assert_allclose(back, np.clip(image, 0, 1), rtol=0, atol=1000 * 2**-24 / 2000 * 2)
    assert of_network(CT, np.array([-1024.0, 3000.0])).tolist() == [0, 1]
    rng = np.random.default_rng(0).uniform(-0.1, 1.1, 100_000).astype(np.float32)
    assert np.abs(written(CT, rng)).max() == 1000
    for network, range_ in (((0, 0), (0, 1)), ((0, 1), (1, 0)), ((0, 1), (0, 2**15))):
        with pytest.raises(ValueError, match="need rising pairs, the second within int16"):
            IntensitySpec(network=network, written=range_, unit="HU")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, CT),
        ({"modality": "mri"}, None),
        ({"intensity": None}, None),
        ({"intensity": {"network": [-1, 1], "written": [0, 255], "unit": "grey"}},
         IntensitySpec(network=(-1, 1), written=(0, 255), unit="grey")),
        ({"intensity": "HU"}, "intensity='HU': need null, or as --set intensity="),
        ({"intensity": {"network": [0, 1]}}, "intensity: written"),
    ],
)  # fmt: skip
def test_where_intensities_come_from(settings: dict[str, Any], wanted: Any) -> None:
    plan = plan_bundle(next(CONFIGS.glob("maisi_rflow.json")), settings=settings)
    assert plan.autoencoder is not None and plan.autoencoder.kind.network is AutoencoderKlMaisi
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            plan_intensity(plan.config, plan.autoencoder)
    else:
        assert plan_intensity(plan.config, plan.autoencoder)[0] == wanted
