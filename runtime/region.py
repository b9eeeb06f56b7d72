"""Volumes through a file in /dev/shm: the client makes it, empty, and names it; the server writes, the client reads.

Triton's own shared memory does not fit: an output has one region a request, so that every further volume of a decoupled
model overwrites the one before, whether it was read or not; the client must know its size beforehand; and whoever may
register a region may read those of others. Here a region grows as it is written, by `pwrite`: a full /dev/shm is then an
error and not a SIGBUS. The server removes the name as it opens it and the kernel frees what nobody holds open, so that
nothing stays behind whoever is killed.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import final

import numpy as np

from .interface import Array

FOLDER = Path("/dev/shm")
_NAME = re.compile(r"volcast-region-[0-9a-f]{32}")
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_PAGE = mmap.ALLOCATIONGRANULARITY


@final
class Region:
    """One side's hold of such a file; `close` it, or use it as a context manager. Not for two threads at once."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self._descriptor, self._end = descriptor, 0

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the file, if nobody has yet, and let go of it."""
        if self._descriptor >= 0:
            with suppress(FileNotFoundError, PermissionError):
                (FOLDER / self.name).unlink()
            os.close(self._descriptor)
            self._descriptor = -1

    def write(self, array: Array) -> int:
        """Append `array`; the offset of its first byte. ValueError: /dev/shm is full."""
        offset = self._end
        rest = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        try:
            while rest:
                written = os.pwrite(self._descriptor, rest, self._end)
                self._end, rest = self._end + written, rest[written:]
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ValueError(
                f"[region] {FOLDER} is full: give it more room, or use no shared memory"
            ) from error
        self._end = -(-self._end // _PAGE) * _PAGE
        return offset

    def take(self, offset: int, shape: tuple[int, ...], dtype: str) -> Array:
        """A copy of the array that begins at `offset`; its memory in the region is given back."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if offset < 0 or offset % _PAGE or size < 1 or offset + size > os.fstat(self._descriptor).st_size:
            raise ValueError(f"[region] no {dtype} {list(shape)} at {offset}")
        with mmap.mmap(self._descriptor, size, offset=offset) as pages:
            array = np.frombuffer(pages, dtype).reshape(shape).copy()
            pages.madvise(mmap.MADV_REMOVE)
        return array


def make_region() -> Region:
    """A new one, empty. ValueError: there is no /dev/shm."""
    name = f"volcast-region-{secrets.token_hex(16)}"
    try:
        return Region(name, os.open(FOLDER / name, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise ValueError(f"[region] {FOLDER}: {error.strerror}; use no shared memory") from error


def open_region(name: str) -> Region:
    """The one that a client has made: an empty file of that kind of name, which is gone afterwards.

    Raises ValueError: another name, no such file, or one that is not empty, not a file, or has another name beside.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"[request] region={name!r}: need the name of a region that the client has made")
    try:
        region = Region(name, os.open(FOLDER / name, _FLAGS | os.O_NONBLOCK))
    except OSError as error:
        raise ValueError(
            f"[request] region={name}: {error.strerror}; the client has to run on the server's machine and see its {FOLDER}"
        ) from error
    about = os.fstat(region._descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_size or about.st_nlink != 1:
        os.close(region._descriptor)
        raise ValueError(f"[request] region={name}: need an empty file with one name")
    with suppress(FileNotFoundError, PermissionError):
        (FOLDER / name).unlink()
    return region
