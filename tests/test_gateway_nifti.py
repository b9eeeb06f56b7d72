"""NIfTI files that callers send: what nibabel reads is what the gateway reads, and what is wrong is refused before it costs."""

from __future__ import annotations

import base64
import gzip
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Extension

from volcast.runtime.nifti import LEAD
from volcast.triton_repo.gateway.nifti import read_upload

MOST = 8 * 12 * 8
AFFINE = np.array([[1, 0, 0, -5], [0, 1.5, 0, 7], [0, 0, 2, 9], [0, 0, 0, 1.0]])
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def file(array: Any = None, edit: Callable[[Any], None] | None = None, header: Any = None) -> bytes:
    """A `.nii`; `edit` changes its header as it is written."""
    array = np.arange(MOST, dtype=np.float32).reshape(8, 12, 8) if array is None else array
    content = bytearray(nibabel.Nifti1Image(array, AFFINE, header).to_bytes())
    if edit is not None:
        changed = nibabel.Nifti1Header(bytes(content[:348]), check=False)
        edit(changed)
        content[:348] = changed.binaryblock
    return bytes(content)


@SLOW
@given(
    dtype=st.sampled_from(["u1", "i2", "i4", "f4", "f8", "i1", "u2", "u4", "i8", "u8"]), order=st.sampled_from("<>"),
    version=st.sampled_from([nibabel.Nifti1Image, nibabel.Nifti2Image]), zipped=st.booleans(),
    slope=st.sampled_from([0.0, 1.0, 0.25, -3.0, np.nan]), inter=st.sampled_from([0.0, 7.5]),
    shape=st.tuples(*[st.integers(1, 6)] * 3), extended=st.booleans(), code=st.sampled_from(["sform", "qform"]),
    turn=st.sampled_from([np.eye(3), np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])]),
)  # fmt: skip
def test_what_nibabel_reads_is_what_is_read(
    tmp_path: Path, dtype: str, order: str, version: Any, zipped: bool, slope: float, inter: float,
    shape: tuple[int, int, int], extended: bool, code: str, turn: np.ndarray,
) -> None:  # fmt: skip
    array = np.random.default_rng(0).integers(0, 100, shape).astype(np.dtype(dtype).newbyteorder(order))
    affine = AFFINE.copy()
    affine[:3, :3] = turn @ affine[:3, :3]
    header = version.header_class(endianness=order)
    header.set_data_dtype(array.dtype)
    image = version(array, affine, header)
    image.set_sform(affine, code=int(code == "sform"))
    image.set_qform(affine, code=int(code == "qform"))
    if extended:
        image.header.extensions.append(Nifti1Extension("comment", b"of the scanner"))
    content = bytearray(image.to_bytes())
    size = len(image.header.binaryblock)
    edited = version.header_class(bytes(content[:size]))
    edited["scl_slope"], edited["scl_inter"] = slope, inter
    content[:size] = edited.binaryblock
    path = tmp_path / ("a.nii.gz" if zipped else "a.nii")
    path.write_bytes(gzip.compress(bytes(content)) if zipped else bytes(content))
    found, numbers = read_upload("image", text(path.read_bytes()), 6**3)
    theirs: Any = nibabel.load(path)
    np.testing.assert_array_equal(numbers, np.asarray(theirs.dataobj, np.float32))
    np.testing.assert_array_equal(found.get_best_affine(), theirs.affine)
    assert found.get_zooms() == theirs.header.get_zooms()


def set_to(**fields: Any) -> Callable[[Any], None]:
    def edit(header: Any) -> None:
        for name, value in fields.items():
            header[name] = value

    return edit


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the file is empty"),
    "text": (b"x" * 400, "no NIfTI file"), "short text": (b"hello", "no NIfTI file"),
    "cut head": (file()[:300], "ends early"),
    "cut numbers": (file()[:-1], "the file ends early, 1 bytes before what its header says; give it whole"),
    "more": (file() + b"\0", "goes on after its numbers"),
    "cut gzip": (gzip.compress(file())[:-1], "the gzip stream ends early"),
    "two gzips": (gzip.compress(file()) * 2, "is not the only one"),
    "broken gzip": (gzip.compress(file())[:50] + bytes(200), "the gzip stream is broken"),
    "other checksum": (gzip.compress(file())[:-8] + bytes(8), "the gzip stream is broken"),
    "pair": (file(edit=set_to(magic=b"ni1")), "of a pair .hdr, .img; write it as one"),
    "magic": (file(edit=set_to(magic=b"abc")), "need b'n+1', NIfTI in one file"),
    "four axes": (file(np.zeros((2, 2, 2, 2), np.float32)), "2 x 2 x 2 x 2 voxels, 4 axes: need two or three; take one"),
    "no axes": (file(edit=set_to(dim=[0, 1, 1, 1, 1, 1, 1, 1])), "0 axes"),
    "many axes": (file(edit=set_to(dim=[9, 1, 1, 1, 1, 1, 1, 1])), "axes: need two or three"),
    "negative size": (file(edit=set_to(dim=[3, -1, 1, 1, 1, 1, 1, 1])), "-1 x 1 x 1 voxels: need sizes of 1 or more"),
    "large": (file(edit=set_to(dim=[3, 8, 12, 9, 1, 1, 1, 1])), f"up to {MOST} voxels"),
    "overflow": (file(edit=set_to(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])), "need sizes of 1 or more and up to"),
    "complex": (file(np.zeros((2, 2, 2), np.complex64)), "datatype 32"),
    "colours": (file(edit=set_to(datatype=128)), "datatype 128"),
    "unknown type": (file(edit=set_to(datatype=3)), "datatype 3"),
    "offset in head": (file(edit=set_to(vox_offset=0)), "vox_offset 0: need 348.."),
    "offset far": (file(edit=set_to(vox_offset=LEAD + 16)), "vox_offset 1.04859e+06"),
    "offset nan": (file(edit=set_to(vox_offset=np.nan)), "vox_offset nan"),
    "offset half": (file(edit=set_to(vox_offset=352.5)), "vox_offset 352.5"),
    "intercept": (file(edit=set_to(scl_slope=1, scl_inter=np.inf)), "scl_inter inf"),
    "nan": (file(np.full((2, 2, 2), np.nan, np.float32)), "holds NaN, infinity or numbers beyond 1e+09"),
    "infinity": (file(np.full((2, 2, 2), np.inf, np.float32)), "holds NaN, infinity or numbers beyond"),
    "beyond float32": (file(np.full((2, 2, 2), 1e300)), "holds NaN, infinity or numbers beyond"),
    "scaled beyond": (file(edit=set_to(scl_slope=3e38, scl_inter=0)), "holds NaN, infinity or numbers beyond"),
    "no affine": (file(edit=set_to(sform_code=0, qform_code=0)), "has no affine"),
    "flat affine": (file(edit=set_to(srow_x=[0, 0, 0, 0])), "places no volume"),
    "nan affine": (file(edit=set_to(srow_y=[0, np.nan, 0, 0])), "places no volume"),
    "skew affine": (file(edit=set_to(srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0])), "places no volume"),
    "far": (file(edit=set_to(srow_x=[1, 0, 0, 1e30])), "places no volume"),
    "no voxel size": (file(edit=set_to(pixdim=[1, 0, 1.5, 2, 0, 0, 0, 0])), "places no volume"),
    "quaternion": (file(edit=set_to(sform_code=0, qform_code=1, quatern_b=9)), "cannot make an affine of its qform"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("error")
def test_what_is_wrong_is_refused_by_name(name: str) -> None:
    content, message = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        read_upload("image", text(content), MOST)
    assert message in str(caught.value) and str(caught.value).startswith("[request] image")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("given", ["a", "====", "AAAA\n", "AAA-", "é", "AA AA"])
def test_no_base64_is_told(given: str) -> None:
    with pytest.raises(ValueError, match=r"\[request\] image: no base64 .*base64 -w0"):
        read_upload("image", given, MOST)


def test_no_more_is_decompressed_than_the_header_tells_of() -> None:
    """128 MiB of zeros, in a file that says that it holds one small volume, or one that nobody may send."""
    bombs = []
    for head in (file(), file(edit=set_to(dim=[3, 1024, 1024, 256, 1, 1, 1, 1]))):
        packer = zlib.compressobj(1, wbits=31)
        zeros = bytes(2**24)
        bombs.append(
            text(packer.compress(head) + b"".join(packer.compress(zeros) for _ in range(8)) + packer.flush())
        )
    for bomb, message in zip(bombs, ["goes on after its numbers", "voxels"], strict=True):
        assert len(bomb) < 2**20
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=message):
                read_upload("image", bomb, MOST)
            # The file itself, as bytes, twice at most; a sixteenth of what is in it.
            assert tracemalloc.get_traced_memory()[1] < 2**23
        finally:
            tracemalloc.stop()


def test_extensions_are_never_looked_at() -> None:
    image = nibabel.Nifti1Image(np.ones((2, 2, 2), np.float32), AFFINE)
    image.header.extensions.append(Nifti1Extension("comment", b"x" * 100))
    content = bytearray(image.to_bytes())
    content[352:360] = b"\xff" * 8  # its length and code: nibabel itself gives up on it
    _, numbers = read_upload("image", text(bytes(content)), MOST)
    np.testing.assert_array_equal(numbers, image.dataobj)


@SLOW
@given(st.data())
def test_any_bytes_are_read_or_refused(data: st.DataObject) -> None:
    """Files with bytes changed, cut and doubled, mostly in the header."""
    content = bytearray(file())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 360) | st.integers(0, max(0, len(content) - 1)))
        content[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    whole = bytes(content)
    try:
        header, numbers = read_upload(
            "image", text(gzip.compress(whole) if data.draw(st.booleans()) else whole), MOST
        )
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert numbers.dtype == np.float32 and np.isfinite(numbers).all() and numbers.size <= MOST
        assert np.isfinite(header.get_best_affine()).all()
