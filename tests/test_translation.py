"""Image to image by concatenation: a bundle whose UNet sees an image beside x, against MONAI's inferer and tutorial loop.

The bundle is one of pixels in two dimensions: the other tests of its kind of model are here too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mask_bundles import UNET, write_bundle
from monai.inferers import DiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from safetensors.torch import load_file

import volcast
from volcast import Inpaint, Volume, _core
from volcast.__main__ import app
from volcast.export.artifact import export_bundle
from volcast.export.bundle import read_bundle
from volcast.export.monai_run import monai_scheduler
from volcast.runtime.volume import centred_affine, read_nifti

SIZE = (16, 24)
FLAT = UNET | {"spatial_dims": 2, "in_channels": 2, "out_channels": 1}
STEPS, SEED = 4, 3
rng = np.random.default_rng(0)
IMAGE = rng.random(SIZE).astype(np.float32)
CLOSE = 2e-5
"""Of MONAI's float32 loop, relative to the largest value: its tables of 1000 products are off by 1000 x 2^-24 = 6e-5 at
the last, of which 4 steps keep a third (as in test_monai_run)."""


def write(root: Path, **settings: Any) -> Path:
    write_bundle(root, {"network_def": FLAT}, [1, *SIZE], **settings)
    return root


@pytest.fixture(scope="module")
def translator(shared_folder: Any) -> Path:
    """The bundle under `bundle`, exported under `artifact` as one trained with the image first."""

    def make(folder: Path) -> None:
        bundle = read_bundle(write(folder / "bundle"), settings={"concat_first": True})
        export_bundle(bundle, folder / "artifact")

    return shared_folder("translator", make)


@pytest.fixture(scope="module")
def model(translator: Path) -> Any:
    return volcast.load(translator / "artifact", "onnxruntime", threads=1)


def trained(bundle: Path) -> DiffusionModelUNet:
    """MONAI's network with the bundle's weights, read by itself."""
    network = DiffusionModelUNet(**{key: value for key, value in FLAT.items() if key != "_target_"})
    network.load_state_dict(load_file(bundle / "network_def.safetensors"))
    return network.eval()


def start() -> torch.Tensor:
    noise = _core.normal(
        np.array([SEED], np.uint64), np.zeros(1, np.uint64), 0, (1, *SIZE), np.dtype("float32")
    )
    return torch.from_numpy(noise)


def slice_file(path: Path, array: np.ndarray) -> Path:
    volume = array[..., None].astype(np.float32)
    Volume(volume, centred_affine(volume.shape, (1.0, 1.0, 1.0)), (1.0, 1.0, 1.0)).save(path)
    return path


def sample(artifact: Path, output: Path, *more: object) -> int:
    words = (
        "sample",
        artifact,
        "-o",
        output,
        "--engine",
        "onnxruntime",
        "--threads",
        1,
        "--steps",
        STEPS,
        *more,
    )
    return app([str(word) for word in words])


def test_monais_inferer(translator: Path, model: Any) -> None:
    """Which has the image last: the network that is exported is the same but for that."""
    network = read_bundle(translator / "bundle", settings={"concat_first": True}).unet
    scheduler = monai_scheduler(model.spec.scheduler, STEPS, SIZE)
    wanted = DiffusionInferer(scheduler).sample(
        start(), network, scheduler, conditioning=torch.from_numpy(IMAGE)[None, None],
        mode="concat", verbose=False,
    )  # fmt: skip
    found = model.sample(SEED, steps=STEPS, compat="monai-1.6", condition={"concat": IMAGE[None]})
    np.testing.assert_allclose(found.array, wanted[0, 0], rtol=0, atol=CLOSE * float(wanted.abs().max()))
    other = model.sample(SEED, steps=STEPS, compat="monai-1.6", condition={"concat": 1 - IMAGE[None]})
    assert np.abs(other.array - found.array).max() > 100 * CLOSE * float(wanted.abs().max())


def test_the_tutorials_loop(translator: Path, tmp_path: Path) -> None:
    """MONAI's image_to_image_translation: `combined = torch.cat((input_img, current_img), dim=1)`, step by step."""
    network, x = trained(translator / "bundle"), start()
    scheduler = monai_scheduler(volcast.load(translator / "artifact").spec.scheduler, STEPS, SIZE)
    with torch.no_grad():
        for t in scheduler.timesteps:
            combined = torch.cat((torch.from_numpy(IMAGE)[None, None], x), dim=1)
            x, _ = scheduler.step(network(x=combined, timesteps=torch.Tensor((t,))), t, x)
    image, output = slice_file(tmp_path / "image.nii.gz", IMAGE), tmp_path / "out.nii.gz"
    how = ("--seed", SEED, "--compat", "monai-1.6", "-c", f"concat=@{image}")
    assert sample(translator / "artifact", output, *how) == 0
    found = read_nifti(output)
    np.testing.assert_allclose(found.array[..., 0], x[0, 0], rtol=0, atol=CLOSE * float(x.abs().max()))
    np.testing.assert_array_equal(found.affine, read_nifti(image).affine)


def test_concat_first_of_nothing(tmp_path: Path) -> None:
    write_bundle(tmp_path / "alone", {"network_def": FLAT | {"in_channels": 1}}, [1, *SIZE])
    with pytest.raises(
        ValueError, match="concat_first: the UNet takes nothing beside the latent's 1 channels"
    ):
        read_bundle(tmp_path / "alone", settings={"concat_first": True})
    with pytest.raises(ValueError, match=r"concat_first=.*need true or false"):
        read_bundle(tmp_path / "alone", settings={"concat_first": "yes"})


def test_five_seeds(translator: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tutorial's ensemble: one image, n=5 seeds, a mean and a variance map where the image lies."""
    image = slice_file(tmp_path / "image.nii.gz", IMAGE)
    maps = ("--mean", tmp_path / "mean.nii.gz", "--variance", tmp_path / "variance.nii.gz")
    words = ("sample", translator / "artifact", "--engine", "onnxruntime", "--threads", 1, "--steps", STEPS, "-n", 5,
             "-c", f"concat=@{image}", "--json", *maps)  # fmt: skip
    assert app([str(word) for word in words]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert (rows[0]["mean"], rows[1]["variance"]) == (5, 5)
    arrays = np.array([v.array for v in model.sample_many(5, steps=STEPS, condition={"concat": IMAGE[None]})])
    for path, wanted in ((maps[1], arrays.mean(0, "f8")), (maps[3], arrays.astype("f8").var(0, ddof=1))):
        found = read_nifti(path)
        np.testing.assert_allclose(found.array[..., 0], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
        np.testing.assert_array_equal(found.affine, read_nifti(image).affine)


def test_inpainting_pixels(model: Any) -> None:
    """No autoencoder: the pixels that stay come back bit for bit, without any paste."""
    scan, mask = rng.random(SIZE).astype(np.float32), np.zeros(SIZE, np.int64)
    mask[:8, 3:9] = 1
    inpaint = Inpaint(mask, resamples=2, paste=False)
    volume = model.sample(
        0, image=scan[None], inpaint=inpaint, steps=STEPS, condition={"concat": IMAGE[None]}
    )
    np.testing.assert_array_equal(volume.array[mask == 0], scan[mask == 0])
    assert (volume.array[mask == 1] != scan[mask == 1]).all()


def test_a_slice_of_the_command_line(translator: Path, tmp_path: Path) -> None:
    """A NIfTI file of one slice is an image of a 2D model: it is started from, and painted."""
    scan, hidden = rng.random(SIZE), np.zeros(SIZE)
    hidden[:4] = 1
    image, mask = slice_file(tmp_path / "image.nii.gz", scan), slice_file(tmp_path / "mask.nii.gz", hidden)
    near = tmp_path / "near.nii.gz"
    how = ("--image", image, "-c", f"concat=@{image}")
    assert sample(translator / "artifact", tmp_path / "a.nii.gz", *how, "--inpaint", mask) == 0
    assert sample(translator / "artifact", near, *how, "--strength", 0.25) == 0
    np.testing.assert_array_equal(
        read_nifti(tmp_path / "a.nii.gz").array[4:, :, 0], scan[4:].astype(np.float32)
    )
    assert read_nifti(near).array.shape == (*SIZE, 1)
