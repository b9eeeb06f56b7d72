"""NIfTI files, bounded and checked before their numbers are read: those of a command line and those that callers send."""

from __future__ import annotations

import gzip
import io
import math
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

LEAD = 2**20
"""Bytes before the numbers, at most: the header, and extensions, which are never looked at."""
MOST_MM = 1e6
"""Voxels of a millionth to so many millimetres: beyond, a header's float32 would not hold what is made of them."""
MOST = 1e9
"""In size: a network's squares and sums of these stay within float32."""
_MAGIC = {348: b"n+1", 540: b"n+2"}
_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}  # fmt: skip


class Source(ABC):
    """The bytes of a file, decompressed. `where` begins its errors."""

    where: str

    @abstractmethod
    def read(self, size: int) -> bytes:
        """The next `size` bytes, or fewer at its end."""

    @abstractmethod
    def end(self) -> None:
        """ValueError: there is more, or what has been read is not what was compressed."""


def load_nifti(where: str, path: str | os.PathLike[str], most_axes: int = 3) -> tuple[Any, NDArray[np.float32]]:  # fmt: skip
    """`read_nifti_from` the file at `path`, compressed or not, whatever its name. ValueError: it cannot be read."""
    try:
        with _open(path) as stream:
            return read_nifti_from(_FileSource(where, stream), most_axes=most_axes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{where}: the gzip stream is broken ({error}); copy or write it again") from error
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{where}: cannot be read ({reason}); give a .nii or .nii.gz file") from error
    except MemoryError as error:
        raise ValueError(f"{where}: does not fit into memory; crop or resample it") from error


def read_nifti_from(
    source: Source, most_voxels: int | None = None, most_axes: int = 3
) -> tuple[Any, NDArray[np.float32]]:
    """nibabel's header of a NIfTI-1 or -2 file in one part, and its numbers `[i, j]`, `[i, j, k]` (or `[i, j, k, c]` with
    `most_axes=4`), scaled as it says. Last axes of one voxel behind the third are dropped.

    No more is read than the header tells of, and that only if it is a volume of up to `most_voxels`.

    Raises:
        ValueError: no such file, other axes, numbers that are not real or not finite, no affine, one that places no volume,
            a file that ends early or goes on.
    """
    where = source.where
    header = _header(source)
    shape, dtype, offset = _layout(where, header, most_voxels, most_axes)
    _check_affine(where, header, min(len(shape), 3))
    _exactly(source, offset - len(header.binaryblock))
    numbers = _exactly(source, math.prod(shape) * dtype.itemsize)
    source.end()
    from nibabel.arrayproxy import ArrayProxy

    slope, inter = _scale(where, header)
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(ArrayProxy(io.BytesIO(numbers), (shape, dtype, 0, slope, inter)), np.float32)
    # Comparisons with NaN are false.
    if not (array.min() >= -MOST and array.max() <= MOST):
        raise ValueError(
            f"{where} holds NaN, infinity or numbers beyond {MOST:g} in size; replace them (numpy.nan_to_num), or scale it as "
            "what the model was trained on"
        )
    return header, array


def voxel_sizes(header: Any) -> tuple[float, float, float]:
    """Millimetres along the three spatial axes as the affine has them: pixdim may say something else."""
    affine = np.asarray(header.get_best_affine(), np.float64)
    i, j, k = (float(size) for size in np.sqrt((affine[:3, :3] ** 2).sum(0)))
    return i, j, k


def _exactly(source: Source, size: int) -> bytes:
    part = source.read(size)
    if len(part) < size:
        raise ValueError(f"{source.where}: the file ends early, {size - len(part)} bytes before what its header says; give it whole")  # fmt: skip
    return part


def _header(source: Source) -> Any:
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    head = source.read(348)
    if not head:
        raise ValueError(f"{source.where}: the file is empty; give a .nii or .nii.gz file")
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")} & _MAGIC.keys()
    if not sizes:
        raise ValueError(f"{source.where}: no NIfTI file; give a .nii or .nii.gz file")
    size = sizes.pop()
    head += _exactly(source, max(0, size - len(head)))
    kind: Any = Nifti1Header if size == 348 else Nifti2Header
    header = kind(head, check=False)  # nibabel's own check would write what it finds to the log
    magic = bytes(header["magic"])
    if magic[:3] in (b"ni1", b"ni2"):
        raise ValueError(f"{source.where}: the header of a pair .hdr, .img; write it as one .nii file")
    if magic[:3] != _MAGIC[size]:
        raise ValueError(f"{source.where}: the magic is {magic[:4]!r}: need {_MAGIC[size]!r}, NIfTI in one file")  # fmt: skip
    return header


def _layout(
    where: str, header: Any, most_voxels: int | None, most_axes: int
) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, type and first byte of the numbers."""
    rank = int(header["dim"][0])
    if not 1 <= rank <= 7:
        raise ValueError(f"{where} has {rank} axes: need two or three; write it again")
    shape = tuple(int(size) for size in header["dim"][1 : rank + 1])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    told = " x ".join(str(size) for size in shape)
    if not 2 <= len(shape) <= most_axes:
        remedy = "; take one volume out, such as image.slicer[..., 0] of nibabel's" if len(shape) > 3 else ""
        raise ValueError(
            f"{where} has {told} voxels, {len(shape)} axes: need two or three{' or four' * (most_axes > 3)}{remedy}"
        )
    if min(shape) < 1 or (most_voxels is not None and math.prod(shape) > most_voxels):
        most = "" if most_voxels is None else f" and up to {most_voxels} voxels"
        raise ValueError(f"{where} has {told} voxels: need sizes of 1 or more{most}")
    code = int(header["datatype"])
    if code not in _DTYPES:
        raise ValueError(f"{where} has datatype {code}: need whole or real numbers, such as float32 (16)")
    dtype = np.dtype(_DTYPES[code]).newbyteorder(header.endianness)
    offset = float(header["vox_offset"])
    if not len(header.binaryblock) <= offset <= LEAD or offset != int(offset):
        raise ValueError(f"{where} has vox_offset {offset:g}: need {len(header.binaryblock)}..{LEAD}")
    return shape, dtype, int(offset)


def _scale(where: str, header: Any) -> tuple[float, float]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0  # not scaled, as NIfTI and nibabel read it
    if not math.isfinite(inter):
        raise ValueError(f"{where} has scl_inter {inter}: need a finite number")
    return slope, inter


def _check_affine(where: str, header: Any, rank: int) -> None:
    if not int(header["sform_code"]) and not int(header["qform_code"]):
        raise ValueError(
            f"{where} has no affine (sform and qform codes are 0), so where its axes point is unknown; write it with one, "
            "such as by nibabel's set_sform(affine, code=1)"
        )
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
        raise ValueError(f"{where}: its affine ({told}) or voxel size (pixdim) {zooms} places no volume in millimetres; write it again")  # fmt: skip


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[io.BufferedIOBase]:
    with open(path, "rb") as file:
        if file.peek(2)[:2] == b"\x1f\x8b":
            with gzip.open(file) as unzipped:
                yield unzipped
        else:
            yield file


@final
class _FileSource(Source):
    def __init__(self, where: str, stream: io.BufferedIOBase) -> None:
        self.where, self._stream = where, stream

    def read(self, size: int) -> bytes:
        return self._stream.read(size)

    def end(self) -> None:
        # At the end of a gzip stream Python compares the checksum.
        if self._stream.read(1):
            raise ValueError(f"{self.where}: the file goes on after its numbers; write it again")
