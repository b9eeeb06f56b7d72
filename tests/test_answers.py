"""Volumes as tensors, there and back."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from volcast.runtime.answers import pack_volume, unpack_volume
from volcast.runtime.interface import Format
from volcast.runtime.volume import Volume, centred_affine


def volume(values: np.ndarray) -> Volume:
    return Volume(values.astype(np.float32), centred_affine(values.shape, (1.0, 1.5, 2.0)), (1.0, 1.5, 2.0))


@pytest.fixture
def noise() -> Volume:
    return volume(5 + 3 * np.random.default_rng(0).standard_normal((4, 5, 6)))


@pytest.mark.parametrize("form", ["float32", "float16", "uint16"])
def test_a_volume_comes_back(noise: Volume, form: Format) -> None:
    back = unpack_volume(pack_volume(noise, form))
    # float16 rounds to 11 bits; uint16 to half a step of the range, and its two float32 numbers round to 24 bits.
    wide = np.ptp(noise.array)
    bound = {
        "float32": 0,
        "float16": 2**-11 * np.abs(noise.array).max(),
        "uint16": wide / 65535 / 2 + 4e-7 * wide,
    }
    assert (
        np.abs(back.array.astype(np.float64) - noise.array).max() <= bound[form] + (form == "uint16") * 1e-6
    )
    np.testing.assert_array_equal(back.affine, noise.affine)
    assert back.spacing_mm == noise.spacing_mm


def test_a_constant_volume_has_a_scale() -> None:
    np.testing.assert_array_equal(
        unpack_volume(pack_volume(volume(np.full((2, 2, 2), 7.0)), "uint16")).array, 7
    )


def test_a_file_is_what_save_writes(noise: Volume, tmp_path: Path) -> None:
    path = tmp_path / "sent.nii.gz"
    packed = pack_volume(noise, "nifti")["nifti"].tobytes()
    assert packed[4:8] == bytes(4)  # RFC 1952: no time, so that equal volumes are equal bytes
    path.write_bytes(packed)
    read = nibabel.load(path)
    np.testing.assert_array_equal(np.asarray(read.dataobj), noise.array)
    np.testing.assert_array_equal(read.affine, noise.affine)
    noise.save(tmp_path / "saved.nii")
    assert (tmp_path / "saved.nii").read_bytes() == noise.nifti()


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit float16; ask for float32"):
        pack_volume(volume(np.full((2, 2, 2), 1e5)), "float16")


def test_an_answer_without_a_volume_is_named(noise: Volume) -> None:
    with pytest.raises(ValueError, match="no volume"):
        unpack_volume(pack_volume(noise, "nifti"))
