"""The operators of an ONNX file, read without the onnx package (onnx/onnx.proto): what memory it takes is found here.

Weights are skipped through, not read, whatever their size; constants of a few numbers (sizes, axes, scales) are kept.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from .protobuf import bytes_fields, varint_fields, varints

DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
}  # fmt: skip
"""ONNX's numbers of the types that programs use, and numpy's names (bfloat16 has none there)."""
FEW = 64
"""Constants of at most so many elements are kept."""

Attribute = int | str | tuple[int, ...]
Span = tuple[mmap.mmap, int, int]
"""A message: the file, where it begins and where it ends."""


@final
@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator. An input that is left out is "". `attributes` holds numbers, texts and lists of numbers; those
    that are fractions or tensors are left out."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    def numbers(self, name: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
        """An attribute that is a list of whole numbers."""
        value = self.attributes.get(name, otherwise)
        return value if isinstance(value, tuple) else otherwise

    def number(self, name: str, otherwise: int) -> int:
        value = self.attributes.get(name, otherwise)
        return value if isinstance(value, int) else otherwise


@final
@dataclass(frozen=True, kw_only=True)
class Constant:
    """A weight, or a few numbers (`values`, None for more than `FEW`)."""

    dtype: str
    shape: tuple[int, ...]
    values: NDArray[np.generic] | None


@final
@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """Attributes:
    nodes: in the order in which the file has them, which runs.
    constants: initializers and what `Constant` operators give, by name.
    inputs: dtype of every input by name.
    outputs: names, in order.
    """

    nodes: tuple[Node, ...]
    constants: Mapping[str, Constant]
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]


def read_graph(path: Path) -> OnnxGraph:
    """The main graph of the ONNX file; operators inside others (`If`, `Loop`) are not looked into.

    Raises ValueError for a file that is no ONNX program.
    """
    try:
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            (graph,) = _messages((data, 0, len(data)), 7)
            return _graph(graph)
    except (IndexError, UnicodeDecodeError, KeyError, ValueError) as error:
        raise ValueError(
            f"[artifact] the operators of {path.name} cannot be read ({error!r}); export the model again with "
            "`volcast export`"
        ) from error


def _graph(graph: Span) -> OnnxGraph:
    constants = dict(_constant(tensor) for tensor in _messages(graph, 5))
    nodes = []
    for message in _messages(graph, 1):
        kind, attributes = _texts(message, 4)[0], {}
        outputs = _texts(message, 2)
        for attribute in _messages(message, 5):
            name = _texts(attribute, 1)[0]
            if kind == "Constant" and name == "value":
                (tensor,) = _messages(attribute, 5)
                constants[outputs[0]] = _constant(tensor)[1]
            value = _attribute(attribute)
            if value is not None:
                attributes[name] = value
        if kind == "Constant" and outputs[0] in constants:
            continue
        nodes.append(Node(kind=kind, inputs=_texts(message, 1), outputs=outputs, attributes=attributes))
    inputs = {}
    for message in _messages(graph, 11):
        name = _texts(message, 1)[0]
        (kind_of,) = _messages(message, 2)
        (tensor,) = _messages(kind_of, 1)
        if name not in constants:
            inputs[name] = DTYPES[_number(tensor, 1)]
    outputs = tuple(_texts(message, 1)[0] for message in _messages(graph, 12))
    return OnnxGraph(nodes=tuple(nodes), constants=constants, inputs=inputs, outputs=outputs)


def _attribute(message: Span) -> Attribute | None:
    kind = _number(message, 20)
    if kind == 2:
        return _number(message, 3)
    if kind == 3:
        data, first, last = _messages(message, 4)[0]
        return data[first:last].decode()
    return _numbers(message, 8) if kind == 7 else None


def _constant(message: Span) -> tuple[str, Constant]:
    shape, dtype = _numbers(message, 1), DTYPES[_number(message, 2)]
    values: NDArray[np.generic] | None = None
    if np.prod(shape, dtype=np.int64) <= FEW and dtype != "bfloat16":
        raw = _messages(message, 9)
        if raw:
            data, first, last = raw[0]
            values = np.frombuffer(data[first:last], np.dtype(dtype).newbyteorder("<")).reshape(shape)
        elif dtype == "int64":
            values = np.array(_numbers(message, 7), np.int64).reshape(shape)
    return _texts(message, 8)[0] if _texts(message, 8) else "", Constant(
        dtype=dtype, shape=shape, values=values
    )


def _messages(message: Span, number: int) -> list[Span]:
    """The fields of that number, as messages."""
    data, start, end = message
    return [(data, first, last) for found, first, last in bytes_fields(data, start, end) if found == number]


def _texts(message: Span, number: int) -> tuple[str, ...]:
    return tuple(data[first:last].decode() for data, first, last in _messages(message, number))


def _numbers(message: Span, number: int) -> tuple[int, ...]:
    """A list of numbers, written one by one or packed."""
    return tuple(_signed(value) for value in _each(message, number))


def _each(message: Span, number: int) -> Iterator[int]:
    data, start, end = message
    yield from (value for found, value in varint_fields(data, start, end) if found == number)
    for _, first, last in _messages(message, number):
        yield from varints(data, first, last)


def _number(message: Span, number: int) -> int:
    return next(iter(_numbers(message, number)), 0)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
