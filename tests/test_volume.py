"""Volumes as NIfTI, read back by nibabel."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from volcast.runtime.volume import Volume, centred_affine, read_nifti


def volume(shape: tuple[int, ...], spacing: tuple[float, ...]) -> Volume:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return Volume(array, centred_affine(shape[-len(spacing) :], spacing), spacing)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_round_trip_keeps_everything(tmp_path: Path, suffix: str) -> None:
    made = volume((5, 6, 7), (1.0, 1.5, 2.25))
    made.save(tmp_path / f"v{suffix}", "x" * 200)
    image = nibabel.load(tmp_path / f"v{suffix}")
    header = image.header
    np.testing.assert_array_equal(np.asarray(image.dataobj), made.array)
    assert image.get_data_dtype() == np.float32 and header.get_slope_inter() == (None, None)
    np.testing.assert_array_equal(image.affine, made.affine)
    np.testing.assert_allclose(header.get_zooms(), (1.0, 1.5, 2.25))
    assert header.get_xyzt_units() == ("mm", "sec")
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(header.get_qform(), made.affine, atol=1e-6)  # a float32 quaternion
    assert len(header["descrip"].item()) == 79
    assert [path.name for path in tmp_path.iterdir()] == [f"v{suffix}"]


def test_a_2d_volume_is_one_slice_and_channels_come_last(tmp_path: Path) -> None:
    volume((5, 6), (0.5, 0.5)).save(tmp_path / "flat.nii")
    assert nibabel.load(tmp_path / "flat.nii").shape == (5, 6, 1)
    made = volume((2, 3, 4, 5), (1.0, 1.0, 1.0))
    made.save(tmp_path / "channels.nii")
    np.testing.assert_array_equal(nibabel.load(tmp_path / "channels.nii").dataobj[..., 1], made.array[1])


def test_the_centre_of_the_volume_is_the_origin() -> None:
    affine = centred_affine((4, 6, 8), (1.0, 2.0, 3.0))
    np.testing.assert_allclose(affine @ [1.5, 2.5, 3.5, 1], [0, 0, 0, 1])
    np.testing.assert_allclose(affine[:3, :3], np.diag([1, 2, 3]))
    np.testing.assert_allclose(centred_affine((4, 6), (1.0, 2.0))[2], [0, 0, 1, 0])


@pytest.mark.parametrize("name", ["out.png", "out", "out.nii.zip", ".nii.gz"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="ends in .nii or .nii.gz"):
        volume((2, 2, 2), (1.0, 1.0, 1.0)).save(tmp_path / name)


def test_what_is_no_volume() -> None:
    eye = np.eye(4)
    for array, spacing in [
        (np.zeros((2, 2, 2)), (1.0, 1.0, 1.0)),
        (np.zeros((2, 2), np.float32), (1.0, 1.0, 1.0)),
        (np.zeros((2, 2), np.float32), (1.0,)),
    ]:
        with pytest.raises(ValueError, match=r"\[volume\] array"):
            Volume(array, eye, spacing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"need \(4, 4\)"):
        Volume(np.zeros((2, 2), np.float32), np.eye(3), (1.0, 1.0))


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        volume((2, 2, 2), (1.0, 1.0, 1.0)).save(tmp_path / "no" / "out.nii")


def test_reading_gives_the_volume_back(tmp_path: Path) -> None:
    made = volume((5, 6, 7), (1.0, 1.5, 2.25))
    made.save(tmp_path / "v.nii.gz")
    read = read_nifti(tmp_path / "v.nii.gz")
    np.testing.assert_array_equal(read.array, made.array)
    np.testing.assert_array_equal(read.affine, made.affine)
    assert read.spacing_mm == made.spacing_mm
