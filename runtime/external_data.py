"""Which other files an ONNX file names, read from its bytes without the onnx package.

Only the few message fields that can hold a tensor are followed (onnx/onnx.proto), so that a file of gigabytes is
skipped through, not read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

# Field numbers of the messages that lead to a TensorProto, and the message each holds.
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_MAX_DEPTH = 64


def external_data(path: Path) -> set[str]:
    """The locations of external data in the ONNX file, as written there.

    Raises:
        ValueError: the file is not a protobuf message.
        OSError: it cannot be read.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"[artifact] {path.name} is empty; export the model again with `volcast export`")
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return set(_locations(data, 0, len(data), "model", 0))
        except (IndexError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(
                f"[artifact] {path.name} is not an ONNX file; export the model again with `volcast export`"
            ) from error


def _locations(data: mmap.mmap, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise RecursionError
    if kind == "entry":
        entry = {field: data[first:last] for field, first, last in _fields(data, start, end)}
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode()
        return
    for field, first, last in _fields(data, start, end):
        inner = _FIELDS[kind].get(field)
        if inner is not None:
            yield from _locations(data, first, last, inner, depth + 1)


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Field number and extent of every length-delimited field; others are skipped."""
    while at < end:
        tag, at = _varint(data, at, end)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(data, at, end)
        elif wire == 1:
            at += 8
        elif wire == 5:
            at += 4
        elif wire == 2:
            size, at = _varint(data, at, end)
            if at + size > end:
                raise IndexError
            yield tag >> 3, at, at + size
            at += size
        else:
            raise IndexError
    if at != end:
        raise IndexError


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for place in range(at, min(at + 10, end)):
        byte = data[place]
        value |= (byte & 0x7F) << 7 * (place - at)
        if byte < 0x80:
            return value, place + 1
    raise IndexError
