"""Reading folders of images: what becomes comparable, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from volcast.__main__ import app
from volcast.export.evaluation_images import read_images
from volcast.runtime.dataset_manifest import Entry, volume_name
from volcast.runtime.volume import Volume, centred_affine

SPACING = (1.0, 1.5, 2.0)


def fill(folder: Path, n: int = 4, shape: tuple[int, ...] = (6, 5, 4), channels: tuple[int, ...] = ()) -> np.ndarray:  # fmt: skip
    """`n` NIfTI files of random numbers in a new folder; gives the numbers."""
    folder.mkdir()
    images = np.random.default_rng(0).random((n, *channels, *shape), np.float32)
    spacing = SPACING[: len(shape)]
    for place, image in enumerate(images):
        Volume(image, centred_affine(shape, spacing), spacing).save(folder / f"case_{place}.nii.gz")
    return images


def put(path: Path, array: np.ndarray, affine: np.ndarray | None) -> None:
    image = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
    if affine is None:
        image.set_sform(None, code=0)
        image.set_qform(None, code=0)
    nibabel.save(image, path)


@pytest.mark.parametrize(("shape", "channels"), [((6, 5, 4), ()), ((6, 5, 4), (2,)), ((6, 5), ())])
def test_volumes_slices_and_channels(tmp_path: Path, shape, channels) -> None:
    wanted = fill(tmp_path / "a", shape=shape, channels=channels)
    found = read_images(tmp_path / "a")
    np.testing.assert_array_equal(found.images, wanted if channels else wanted[:, None])
    assert found.names == tuple(f"case_{i}" for i in range(4)) and found.spacing_mm == SPACING[: len(shape)]


def test_another_orientation_is_the_same_image(tmp_path: Path) -> None:
    wanted = fill(tmp_path / "a")
    image = nibabel.load(tmp_path / "a" / "case_1.nii.gz")
    turned = image.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    assert turned.shape != image.shape
    nibabel.save(turned, tmp_path / "a" / "case_1.nii.gz")
    np.testing.assert_array_equal(read_images(tmp_path / "a").images[:, 0], wanted)


def test_a_slice_through_another_axis(tmp_path: Path) -> None:
    wanted = fill(tmp_path / "a", shape=(6, 1, 4))
    found = read_images(tmp_path / "a")
    np.testing.assert_array_equal(found.images[:, 0], wanted[:, :, 0])
    assert found.spacing_mm == (1.0, 2.0)


def test_pictures(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 60_000, (4, 5, 6)).astype(np.uint16)
    for place, each in enumerate(deep):
        Image.fromarray(each).save(tmp_path / f"{place}.png")
    found = read_images(tmp_path)
    np.testing.assert_array_equal(found.images[:, 0], deep)
    assert found.spacing_mm == ()


def test_a_generated_dataset_is_what_its_manifest_says(tmp_path: Path) -> None:
    """A volume that a killed run left without a line is left out."""
    fill(tmp_path / "a", n=5)
    folder = tmp_path / "set"
    (folder / "shard-00000").mkdir(parents=True)
    lines = []
    for index in range(5):
        (tmp_path / "a" / f"case_{index}.nii.gz").rename(folder / volume_name(index))
        entry = Entry(
            index=index, seed=0, sample=index, conditions={}, file=volume_name(index), sha256="", bytes=1, shape=(6, 5, 4)
        )  # fmt: skip
        lines.append(entry.model_dump_json() + "\n")
    (folder / "dataset.json").write_text("{}")
    (folder / "manifest.jsonl").write_text("".join(lines[:4]))
    assert read_images(folder).names == tuple(f"shard-00000/0000000{index}" for index in range(4))


def no_affine(folder: Path) -> None:
    put(folder / "case_2.nii.gz", np.zeros((6, 5, 4), np.float32), None)


def another_shape(folder: Path) -> None:
    put(folder / "case_2.nii.gz", np.zeros((6, 5, 5), np.float32), np.diag([*SPACING, 1]))


def other_voxels(folder: Path) -> None:
    put(folder / "case_2.nii.gz", np.zeros((6, 5, 4), np.float32), np.eye(4))


def other_channels(folder: Path) -> None:
    put(folder / "case_2.nii.gz", np.zeros((6, 5, 4, 3), np.float32), np.diag([*SPACING, 1]))


def infinite(folder: Path) -> None:
    array = np.zeros((6, 5, 4), np.float32)
    array[2, 3, 1] = np.inf
    put(folder / "case_2.nii.gz", array, np.diag([*SPACING, 1]))


def cut_short(folder: Path) -> None:
    path = folder / "case_2.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def too_few(folder: Path) -> None:
    (folder / "case_2.nii.gz").unlink()


def two_kinds(folder: Path) -> None:
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(folder / "x.png")


def twice(folder: Path) -> None:
    put(folder / "case_2.nii", np.zeros((6, 5, 4), np.float32), np.diag([*SPACING, 1]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_affine, "case_2.nii.gz has no affine"),
        (another_shape, "case_2.nii.gz has the shape 6 x 5 x 5, "),
        (other_voxels, "has voxels of 1 x 1 x 1 mm"),
        (other_channels, "case_2.nii.gz has 3 channels, case_0.nii.gz 1"),
        (infinite, "case_2.nii.gz holds NaN, infinity or"),
        (cut_short, "case_2.nii.gz: the gzip stream is broken"),
        (too_few, "holds 3 images (.nii, .nii.gz, .png): need 4 or more"),
        (two_kinds, "holds both NIfTI and PNG (x.png)"),
        (twice, "holds case_2 twice"),
    ],
)
def test_what_is_refused(tmp_path: Path, capfd, spoil, message: str) -> None:
    fill(tmp_path / "real")
    fill(tmp_path / "samples")
    spoil(tmp_path / "samples")
    assert app(["evaluate", str(tmp_path / "samples"), str(tmp_path / "real")]) == 2
    out, err = capfd.readouterr()
    assert not out and message in err.splitlines()[-1]


def test_two_folders_that_do_not_fit(tmp_path: Path, capfd) -> None:
    fill(tmp_path / "a")
    for name, options, message in (
        ("b", {"shape": (6, 5, 5)}, "need one shape"),
        ("c", {"channels": (2,)}, "has 1 channels"),
    ):
        fill(tmp_path / name, **options)
        assert app(["evaluate", str(tmp_path / "a"), str(tmp_path / name)]) == 2
        assert message in capfd.readouterr().err
    assert app(["evaluate", str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    assert "none is no folder" in capfd.readouterr().err


def test_a_coloured_picture(tmp_path: Path) -> None:
    for place in range(4):
        Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / f"{place}.png")
    with pytest.raises(ValueError, match="mode RGB: need grey ones"):
        read_images(tmp_path)
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match="cannot read it as PNG"):
        read_images(tmp_path)
