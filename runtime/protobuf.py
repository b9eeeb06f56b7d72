"""Protocol buffers read field by field, without the onnx package: https://protobuf.dev/programming-guides/encoding."""

from __future__ import annotations

import mmap
from collections.abc import Iterator


def bytes_fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number and extent of every length-delimited field of the message in data[start:end].

    Raises IndexError for what is no message.
    """
    return ((number, first, last) for number, wire, first, last in _fields(data, start, end) if wire == 2)


def varint_fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Number and value of every varint field of the message in data[start:end]."""
    for number, wire, first, last in _fields(data, start, end):
        if wire == 0:
            yield number, _varint(data, first, last)[0]


def varints(data: mmap.mmap, start: int, end: int) -> Iterator[int]:
    """The numbers of a packed field that lies in data[start:end]."""
    while start < end:
        value, start = _varint(data, start, end)
        yield value


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type and extent of every field."""
    while at < end:
        tag, at = _varint(data, at, end)
        wire = tag & 7
        if wire == 0:
            size = _varint(data, at, end)[1] - at
        elif wire == 1:
            size = 8
        elif wire == 5:
            size = 4
        elif wire == 2:
            size, at = _varint(data, at, end)
        else:
            raise IndexError
        if at + size > end:
            raise IndexError
        yield tag >> 3, wire, at, at + size
        at += size


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for place in range(at, min(at + 10, end)):
        byte = data[place]
        value |= (byte & 0x7F) << 7 * (place - at)
        if byte < 0x80:
            return value, place + 1
    raise IndexError
