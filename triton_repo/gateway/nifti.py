"""NIfTI files that callers send: bounded and checked before their numbers are read."""

from __future__ import annotations

import base64
import io
import math
import zlib
from typing import Any, final

import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from numpy.typing import NDArray

LEAD = 2**20
"""Bytes before the numbers, at most: the header, and extensions, which are never looked at."""
MOST_MM = 1e6
"""Voxels of a millionth to so many millimetres: beyond, a header's float32 would not hold what is made of them."""
MOST = 1e9
"""In size: a network's squares and sums of these stay within float32."""
_HEADERS: dict[int, type[Nifti1Header]] = {348: Nifti1Header, 540: Nifti2Header}
_MAGIC = {348: b"n+1", 540: b"n+2"}
_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}  # fmt: skip


def read_upload(name: str, text: str, most_voxels: int) -> tuple[Any, NDArray[np.float32]]:
    """nibabel's header of the `.nii` or `.nii.gz` file in the base64 `text`, and its numbers `[i, j, k]`, scaled as it says.

    No more is decompressed than the header tells of, and that only if it is a volume of up to `most_voxels`.

    Raises:
        ValueError: no base64, no such file, other than two or three axes, numbers that are not real or not finite, no
            affine, a file that ends early or goes on. `name` stands in the message.
    """
    where = f"[request] {name}"
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(
            f"{where}: no base64 ({error}); send the whole file as `base64 -w0` writes it"
        ) from None
    source = _Source(where, content)
    header = _header(where, source)
    shape, dtype, offset = _layout(where, header, most_voxels)
    _check_affine(where, header, len(shape))
    source.read(offset - len(header.binaryblock))
    numbers = source.read(math.prod(shape) * dtype.itemsize)
    source.end()
    slope, inter = _scale(where, header)
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(ArrayProxy(io.BytesIO(numbers), (shape, dtype, 0, slope, inter)), np.float32)
    # Comparisons with NaN are false.
    if not (array.min() >= -MOST and array.max() <= MOST):
        raise ValueError(
            f"{where} holds NaN or numbers beyond {MOST:g} in size; scale it as what the model was trained on"
        )
    return header, array


def _header(where: str, source: _Source) -> Nifti1Header:
    head = source.read(348)
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")} & _HEADERS.keys()
    if not sizes:
        raise ValueError(f"{where}: no NIfTI file; send a .nii or .nii.gz")
    size = sizes.pop()
    # nibabel's own check would write what it finds to the log.
    header = _HEADERS[size](head + source.read(size - 348), check=False)
    if bytes(header["magic"])[:3] != _MAGIC[size]:
        raise ValueError(f"{where}: the magic is {bytes(header['magic'])[:4]!r}: need {_MAGIC[size]!r}, one file for header and numbers")  # fmt: skip
    return header


def _layout(where: str, header: Nifti1Header, most_voxels: int) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, type and first byte of the numbers."""
    rank = int(header["dim"][0])
    if rank not in (2, 3):
        raise ValueError(f"{where} has {rank} axes: need two or three; take one volume out of a series")
    shape = tuple(int(size) for size in header["dim"][1 : rank + 1])
    if min(shape) < 1 or math.prod(shape) > most_voxels:
        raise ValueError(f"{where} has shape {shape}: need sizes of 1 or more and up to {most_voxels} voxels")
    code = int(header["datatype"])
    if code not in _DTYPES:
        raise ValueError(f"{where} has datatype {code}: need whole or real numbers, such as float32 (16)")
    dtype = np.dtype(_DTYPES[code]).newbyteorder(header.endianness)
    offset = float(header["vox_offset"])
    if not len(header.binaryblock) <= offset <= LEAD or offset != int(offset):
        raise ValueError(f"{where} has vox_offset {offset:g}: need {len(header.binaryblock)}..{LEAD}")
    return shape, dtype, int(offset)


def _scale(where: str, header: Nifti1Header) -> tuple[float, float]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0  # not scaled, as NIfTI and nibabel read it
    if not math.isfinite(inter):
        raise ValueError(f"{where} has scl_inter {inter}: need a finite number")
    return slope, inter


def _check_affine(where: str, header: Nifti1Header, rank: int) -> None:
    if not int(header["sform_code"]) and not int(header["qform_code"]):
        raise ValueError(f"{where} has no affine (sform and qform codes are 0); write it with one")
    zooms = [float(size) for size in header["pixdim"][1 : rank + 1]]
    try:
        with np.errstate(all="ignore"):
            affine = np.asarray(header.get_best_affine(), np.float64)
            lengths = np.sqrt((affine[:3, :3] ** 2).sum(0))
            volume = abs(np.linalg.det(affine[:3, :3] / lengths))
    except (ValueError, np.linalg.LinAlgError) as error:
        raise ValueError(f"{where}: cannot make an affine of its qform ({error}); write it again") from None
    sizes = [*lengths, *zooms]
    # Comparisons with NaN are false.
    if not (
        all(1 / MOST_MM <= size <= MOST_MM for size in sizes)
        and np.abs(affine).max() <= MOST_MM
        and volume > 1e-3
    ):
        told = "; ".join(" ".join(f"{one:g}" for one in row) for row in affine[:3])
        raise ValueError(f"{where}: its affine ({told}) or voxel size {zooms} places no volume in millimetres; write it again")  # fmt: skip


@final
class _Source:
    """The bytes of a file, decompressed as far as they are asked for."""

    def __init__(self, where: str, content: bytes) -> None:
        self._where = where
        self._rest = content
        self._gzip = zlib.decompressobj(31) if content[:2] == b"\x1f\x8b" else None

    def read(self, size: int) -> bytes:
        """The next `size` bytes. ValueError: there are not as many."""
        part = self._take(size)
        if len(part) < size:
            raise ValueError(f"{self._where}: the file ends early; send it whole")
        return part

    def end(self) -> None:
        """ValueError: there is more, or what has been read is not what was compressed."""
        if self._take(1):
            raise ValueError(f"{self._where}: the file goes on after its numbers; write it again")
        if self._gzip is not None and (not self._gzip.eof or self._gzip.unused_data):
            raise ValueError(
                f"{self._where}: the gzip stream ends early or is not the only one; send one whole"
            )

    def _take(self, size: int) -> bytes:
        if self._gzip is None:
            part, self._rest = self._rest[:size], self._rest[size:]
            return part
        try:
            part = self._gzip.decompress(self._rest, size) if size else b""  # 0 would mean any number
        except zlib.error as error:
            raise ValueError(f"{self._where}: the gzip stream is broken ({error}); send it again") from None
        if size:
            self._rest = self._gzip.unconsumed_tail
        return part
