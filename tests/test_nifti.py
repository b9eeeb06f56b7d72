"""NIfTI files by path: those that other programs write are read as nibabel reads them, others refused in one line."""

from __future__ import annotations

import base64
import gzip
import os
import re
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from volcast.__main__ import app
from volcast.runtime.artifact import read_artifact
from volcast.runtime.mask import read_on_grid
from volcast.runtime.nifti import load_nifti
from volcast.runtime.volume import read_nifti
from volcast.triton_repo.gateway.files import Files

AFFINE = np.array([[1.0, 0, 0, 5], [0, 1.5, 0, -7], [0, 0, 2, 9], [0, 0, 0, 1]])
ARRAY = np.sin(np.arange(768, dtype=np.float32)).reshape(8, 12, 8)


def content(
    array: np.ndarray[Any, Any] = ARRAY, header: Any = None, **numbers: tuple[int, str, Any]
) -> bytes:
    """Of a `.nii`; `numbers`: a place in it, the format, and what is to stand there."""
    data = bytearray(nibabel.Nifti1Image(array, AFFINE, header).to_bytes())
    for place, form, values in numbers.values():
        struct.pack_into(form, data, place, *np.atleast_1d(values))
    return bytes(data)


def big_endian() -> bytes:
    return content(header=nibabel.Nifti1Header(endianness=">"))


READ = {
    "big.nii": big_endian(),
    "zipped.nii": gzip.compress(content()),  # under another's name
    "plain.nii.gz": content(),
    "blocks.nii.gz": gzip.compress(content()[:1000]) + gzip.compress(content()[1000:]),  # as bgzip writes
    "series.nii": content(ARRAY[..., None]),
    "vectors.nii": content(ARRAY[..., None, None]),
    "noname": content(),
    "whole.nii": content(np.arange(768, dtype=np.int16).reshape(8, 12, 8), slope=(112, "<2f", (0.25, -7))),
    "ünïcode ö.nii": content(),
}


@pytest.mark.parametrize("name", READ)
def test_what_other_programs_write(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(READ[name])
    raw = READ[name] if READ[name][:2] != b"\x1f\x8b" else gzip.decompress(READ[name])
    theirs = nibabel.Nifti1Image.from_bytes(raw)
    read = read_nifti(path)
    np.testing.assert_array_equal(read.array, theirs.get_fdata(dtype=np.float32).reshape(8, 12, 8))
    np.testing.assert_array_equal(read.affine, AFFINE)
    assert read.spacing_mm == (1, 1.5, 2)


def test_voxels_are_those_of_the_affine_not_of_pixdim(tmp_path: Path, gaussian: Path) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(content(pixdim=(80, "<3f", (1, 1, 1))))
    spec = read_artifact(gaussian).model_copy(update={"spacing_mm": (1.0, 1.5, 2.0)})
    files = Files(spec, 10_000)
    for read in (
        read_nifti(path),
        read_on_grid(path, spec),
        files.image(base64.b64encode(path.read_bytes()).decode()),
    ):
        assert read is not None and read.spacing_mm == (1, 1.5, 2)
    # Voxels of 1 mm by pixdim alone.
    other = spec.model_copy(update={"spacing_mm": (1.0, 1.0, 1.0)})
    with pytest.raises(ValueError, match="a.nii has voxels of 1 x 1.5 x 2 mm: the model has 1 x 1 x 1"):
        read_on_grid(path, other)
    with pytest.raises(ValueError, match="image has voxels of 1 x 1.5 x 2 mm: the model has 1 x 1 x 1"):
        Files(other, 10_000).image(base64.b64encode(path.read_bytes()).decode())


def test_two_axes_are_one_slice(tmp_path: Path, gaussian: Path) -> None:
    path = tmp_path / "flat.nii"
    path.write_bytes(content(ARRAY[..., 0]))
    read = read_nifti(path)
    np.testing.assert_array_equal(read.array, ARRAY[..., :1])
    assert read.spacing_mm == (1, 1.5, 1)
    spec = read_artifact(gaussian)
    flat = spec.model_copy(update={"latent_shape": (2, 4, 6), "spacing_mm": (1.0, 1.5)})
    for one in (flat, None):
        np.testing.assert_array_equal(read_on_grid(path, one).array, ARRAY[..., 0])
    with pytest.raises(ValueError, match="flat.nii has shape .*: need three axes"):
        read_on_grid(path, spec)


def nan() -> bytes:
    array = ARRAY.copy()
    array[3, 4, 5] = np.nan
    return content(array)


whole = gzip.compress(content())
REFUSED = {
    "empty.nii": (b"", "the file is empty"),
    "empty.nii.gz": (gzip.compress(b""), "the file is empty"),
    "text.nii": (b"hello", "no NIfTI file"),
    "page.nii.gz": (gzip.compress(b"<html>" * 100), "no NIfTI file"),
    "cut.nii": (content()[:2000], "ends early, 1424 bytes before"),
    "cut.nii.gz": (whole[:-20], "the gzip stream is broken"),
    "flipped.nii.gz": (whole[:-8] + bytes(4) + whole[-4:], "the gzip stream is broken (CRC check failed"),
    "damaged.nii.gz": (whole[:30] + b"\xff" * 300 + whole[330:], "the gzip stream is broken"),
    "more.nii": (content() + b"\0", "goes on after its numbers"),
    "colours.nii": (content(np.zeros((8, 12, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])), "datatype 128"),
    "four.nii": (content(np.stack([ARRAY] * 3, -1)), "8 x 12 x 8 x 3 voxels, 4 axes: need two or three; take one"),
    "vast.nii": (content(dim=(42, "<3h", (32767,) * 3)), "does not fit into memory"),
    "none.nii": (content(dim=(42, "<h", 0)), "has 0 x 12 x 8 voxels"),
    "nan.nii": (nan(), "holds NaN, infinity or numbers beyond"),
    "zero.nii": (content(pixdim=(80, "<f", 0)), "voxel size (pixdim) [0.0, 1.5, 2.0] places no volume"),
    "negative.nii": (content(pixdim=(80, "<f", -1)), "voxel size (pixdim) [-1.0, 1.5, 2.0] places no volume"),
    "nowhere.nii": (content(codes=(252, "<2h", (0, 0))), "has no affine (sform and qform codes are 0)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("error")
def test_what_is_refused(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data, message = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_nifti(f"[volume] {tmp_path / name}", tmp_path / name)
    assert str(error.value).startswith(f"[volume] {tmp_path / name}") and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # nibabel would log what it finds


def test_what_is_no_file(tmp_path: Path) -> None:
    os.symlink("gone", tmp_path / "link.nii")
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "link.nii", "No such file or directory")):
        with pytest.raises(ValueError, match=rf"cannot be read \({reason}\); give a .nii or .nii.gz file"):
            read_nifti(path)


def test_a_command_names_the_file(gaussian: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad, out = tmp_path / "scan.nii", tmp_path / "out.nii"
    bad.write_bytes(nan())
    for words in (
        ["sample", gaussian, "--image", bad, "-o", out],
        ["anomaly", gaussian, bad, "-o", out],
        ["likelihood", gaussian, bad],
        ["request", "--image", bad, "-o", out],
        ["request", "-c", f"mask=@{bad}", "-o", out],
    ):
        assert app([str(word) for word in words]) == 2
        message = capfd.readouterr().err.splitlines()[-1]
        assert f"{bad} holds NaN" in message and "numpy.nan_to_num" in message
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii"]
