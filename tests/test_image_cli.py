"""`volcast sample --image --inpaint`: what Python does, from files; refusals."""

from pathlib import Path

import numpy as np
import pytest

import volcast
from volcast import Inpaint, Volume
from volcast.__main__ import app
from volcast.runtime.volume import centred_affine, read_nifti

SHAPE, SPACING = (8, 12, 8), (1.0, 1.5, 2.0)
rng = np.random.default_rng(0)


def write(path: Path, array: np.ndarray, spacing: tuple[float, ...] = SPACING) -> Path:
    Volume(array.astype(np.float32), centred_affine(array.shape, spacing), spacing).save(path)
    return path


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write(tmp_path / "scan.nii.gz", rng.random(SHAPE))


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    array = np.zeros(SHAPE)
    array[2:5, 4:8] = 1
    return write(tmp_path / "mask.nii.gz", array)


def sample(artifact: Path, output: Path, *more: object) -> int:
    words = ("sample", artifact, "-o", output, "--engine", "onnxruntime", "--steps", 4, *more)
    return app([str(word) for word in words])


def test_inpainting_from_files(gaussian: Path, scan: Path, mask: Path, tmp_path: Path) -> None:
    how = ("--resamples", 2, "--jump-length", 2, "--no-paste")
    assert sample(gaussian, tmp_path / "a.nii.gz", "--image", scan, "--inpaint", mask, *how) == 0
    inpaint = Inpaint(read_nifti(mask), resamples=2, jump_length=2, paste=False)
    wanted = volcast.load(gaussian, "onnxruntime").sample(image=read_nifti(scan), inpaint=inpaint, steps=4)
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii.gz").array, wanted.array)
    assert sample(gaussian, tmp_path / "b.nii.gz", "--image", scan, "--inpaint", mask) == 0
    stays = read_nifti(mask).array == 0
    pasted = read_nifti(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(pasted.array[stays], read_nifti(scan).array[stays])
    assert (wanted.array[stays] != read_nifti(scan).array[stays]).any()


def test_refusals(gaussian: Path, scan: Path, mask: Path, tmp_path: Path, capsys) -> None:
    other = write(tmp_path / "other.nii.gz", np.ones((8, 12, 9)))
    for more, message in (
        (("--inpaint", mask), "--inpaint: without --image FILE"),
        (
            ("--image", scan, "--resamples", 3, "--no-paste"),
            "--resamples, --no-paste: without --inpaint FILE",
        ),
        (
            ("--image", scan, "--inpaint", other),
            "the mask is float32 (8, 12, 9): need numbers of the image's shape",
        ),
        (
            ("--image", scan, "--inpaint", mask, "--scheduler", "pndm"),
            "[repaint] pndm remembers earlier steps",
        ),
        (("--image", scan, "--inpaint", mask, "--jump-length", 4), "jumps back 4 of 4 steps: need fewer"),
        (("--image", scan, "--inpaint", tmp_path / "none.nii"), "none.nii: cannot be read (No such file"),
    ):
        assert sample(gaussian, tmp_path / "out.nii.gz", *more) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.nii.gz").exists()
