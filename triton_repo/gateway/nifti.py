"""NIfTI files that callers send."""

from __future__ import annotations

import base64
import zlib
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from volcast.runtime.nifti import Source, read_nifti_from


def read_upload(name: str, text: str, most_voxels: int) -> tuple[Any, NDArray[np.float32]]:
    """`read_nifti_from` the `.nii` or `.nii.gz` file in the base64 `text`, of two or three axes and up to `most_voxels`.

    Raises:
        ValueError: no base64, or what `read_nifti_from` raises. `name` stands in the message.
    """
    where = f"[request] {name}"
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(
            f"{where}: no base64 ({error}); send the whole file as `base64 -w0` writes it"
        ) from None
    return read_nifti_from(_Upload(where, content), most_voxels)


@final
class _Upload(Source):
    """The bytes of a file, decompressed as far as they are asked for."""

    def __init__(self, where: str, content: bytes) -> None:
        self.where = where
        self._rest = content
        self._gzip = zlib.decompressobj(31) if content[:2] == b"\x1f\x8b" else None

    def end(self) -> None:
        if self.read(1):
            raise ValueError(f"{self.where}: the file goes on after its numbers; write it again")
        if self._gzip is not None and (not self._gzip.eof or self._gzip.unused_data):
            raise ValueError(
                f"{self.where}: the gzip stream ends early or is not the only one; send one whole"
            )

    def read(self, size: int) -> bytes:
        if self._gzip is None:
            part, self._rest = self._rest[:size], self._rest[size:]
            return part
        try:
            part = self._gzip.decompress(self._rest, size) if size else b""  # 0 would mean any number
        except zlib.error as error:
            raise ValueError(f"{self.where}: the gzip stream is broken ({error}); send it again") from None
        if size:
            self._rest = self._gzip.unconsumed_tail
        return part
