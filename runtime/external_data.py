"""Which other files an ONNX file names, read from its bytes without the onnx package.

Only the few message fields that can hold a tensor are followed (onnx/onnx.proto), so that a file of gigabytes is
skipped through, not read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from .protobuf import bytes_fields

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

EXTERNAL_BYTES = 1_500_000_000
"""Weights above this go to a file beside the model: protobuf ends at 2 GB."""


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
        entry = {field: data[first:last] for field, first, last in bytes_fields(data, start, end)}
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode()
        return
    for field, first, last in bytes_fields(data, start, end):
        inner = _FIELDS[kind].get(field)
        if inner is not None:
            yield from _locations(data, first, last, inner, depth + 1)
