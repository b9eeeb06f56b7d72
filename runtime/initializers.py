"""The weights of an ONNX file, read without the onnx package (onnx/onnx.proto)."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .protobuf import bytes_fields, varint_fields

GRAPH_OF_MODEL, INITIALIZER_OF_GRAPH = 7, 5
TYPE, NAME, RAW, EXTERNAL = 2, 8, 9, 13  # of TensorProto
STORED = {1: "<f4", 10: "<f2", 16: "<u2"}
BFLOAT16 = 16


def read_initializers(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every floating-point initializer of the ONNX file, flat, as float32, by name.

    Raises ValueError for a file that is no ONNX program or stores weights otherwise than `volcast export` does.
    """
    found: dict[str, NDArray[np.float32]] = {}
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for number, first, last in bytes_fields(data, 0, len(data)):
                if number != GRAPH_OF_MODEL:
                    continue
                for inner, start, end in bytes_fields(data, first, last):
                    if inner == INITIALIZER_OF_GRAPH:
                        _read(data, start, end, path, found)
        except (IndexError, UnicodeDecodeError, KeyError, OSError) as error:
            raise ValueError(
                f"[artifact] the weights in {path.name} cannot be read ({error!r}); export the model again with "
                "`volcast export`"
            ) from error
    return found


def _read(data: mmap.mmap, start: int, end: int, path: Path, found: dict[str, NDArray[np.float32]]) -> None:
    kind = dict(varint_fields(data, start, end))[TYPE]
    if kind not in STORED:
        return
    parts = {
        number: data[first:last]
        for number, first, last in bytes_fields(data, start, end)
        if number != EXTERNAL
    }
    name, raw = parts[NAME].decode(), parts.get(RAW)
    if raw is None:
        raw = _external(data, start, end, path)
    values = np.frombuffer(raw, STORED[kind])
    if kind == BFLOAT16:
        found[name] = (values.astype(np.uint32) << 16).view(np.float32)
    else:
        found[name] = values.astype(np.float32)


def _external(data: mmap.mmap, start: int, end: int, path: Path) -> bytes:
    entries: dict[str, str] = {}
    for number, first, last in bytes_fields(data, start, end):
        if number == EXTERNAL:
            entry = {key: data[at:to].decode() for key, at, to in bytes_fields(data, first, last)}
            entries[entry[1]] = entry[2]
    with open(path.parent / entries["location"], "rb") as stream:
        stream.seek(int(entries.get("offset", 0)))
        content = stream.read(int(entries["length"]))
    if len(content) != int(entries["length"]):
        raise IndexError
    return content
