"""Builds a draft from an ONNX graph: values, weights and sizes; the operators are in `lower_operators`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor

from volcast.runtime.device.program import Kind, Operation

from .draft import Draft

Shape = tuple[int | None, ...]
"""None where a size is free."""

Size = int | tuple[str, int]
"""A number as ONNX's Reshape takes it (0 keeps, -1 is what remains), or the size of a value along an axis."""


def refused(node: NodeProto, why: str) -> ValueError:
    return ValueError(
        f"[build] {node.op_type} {node.output[0]}: no device operation: {why}; use another engine (--engine onnxruntime)"
    )


def channel_axis(rank: int) -> int:
    """Where a program's values have their channels: volumes `N C ..`, tokens `N L C`, vectors `N C`."""
    return 1 if rank >= 4 else rank - 1


@final
class Lowering:
    """One program being lowered. Operators read with `value`, `number`, `sizes` and write with `emit`, `reshape`,
    `elementwise`.

    Vectors `N C` that ONNX spreads over positions (`N 1 C`, `N C 1 1 1`) stay vectors: pointwise operations spread
    them, and only another reader gets them reshaped.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.node_of = {name: node for node in graph.node for name in node.output}
        self.readers = Counter(name for node in graph.node for name in node.input)
        self.readers.update(value.name for value in graph.output)
        self.operations: dict[str, Operation] = {}
        self.shapes: dict[str, Shape] = {}
        self._weights: dict[str, Tensor] = {}
        self._arrays = {one.name: one for one in graph.initializer}
        self._sizes: dict[str, list[Size]] = {}
        self._names: dict[str, str] = {}
        self._vectors: dict[str, tuple[str, int]] = {}
        self._known: dict[str, str] = {}
        self._inputs = tuple(value.name for value in graph.input)
        self._outputs = tuple(value.name for value in graph.output)
        for value in graph.input:
            axes = value.type.tensor_type.shape.dim
            self.shapes[value.name] = tuple(axis.dim_value or None for axis in axes)
        for one in graph.initializer:
            self.shapes[one.name] = tuple(one.dims)

    def draft(self) -> Draft:
        outputs = tuple(self.value(name) for name in self._outputs)
        shapes = {name: self.shapes[name] for name in self._inputs}
        empty = Draft(inputs=self._inputs, outputs=outputs, operations=(), weights={}, shapes=shapes)
        return empty.edited(self.operations.values(), self._weights)

    def is_weight(self, name: str) -> bool:
        return self._names.get(name, name) in self._arrays

    def array(self, name: str) -> NDArray[Any]:
        """An initializer, in the type in which it is stored. Raises KeyError for what is computed."""
        return numpy_helper.to_array(self._arrays[self._names.get(name, name)])

    def number(self, name: str) -> float | None:
        """The number in a constant of one element; None for all else."""
        if not self.is_weight(name) or any(size != 1 for size in self.shapes[name]):
            return None
        return float(self.array(name).reshape(()))

    def weight(self, name: str, array: NDArray[Any] | None = None) -> str:
        """A weight of the draft, float32: an initializer, or `array` under a new name."""
        name = self._names.get(name, name)
        if name not in self._weights:
            given = self.array(name) if array is None else array
            self._weights[name] = torch.from_numpy(np.array(given, dtype=np.float32, order="C"))
        return name

    def value(self, name: str) -> str:
        """The draft's name of an ONNX value, in ONNX's shape."""
        if self.is_weight(name):
            return self.weight(name)
        if name in self._vectors:
            vector, axis = self._vectors[name]
            sizes: list[Size] = [1] * len(self.shapes[name])
            sizes[0], sizes[axis] = 0, -1
            made = f"{name}.spread"
            return self.emit(made, "reshape", [vector], self.shapes[name], sizes=sizes)
        return self._names.get(name, name)

    def vector(self, name: str) -> tuple[str, int] | None:
        """The vector `N C` behind a spread value and the axis of its channels; None if there is none."""
        if name in self._vectors:
            return self._vectors[name]
        is_vector = len(self.shapes[name]) == 2 and not self.is_weight(name)
        return (self._names.get(name, name), 1) if is_vector else None

    def vector_axis(self, name: str) -> int | None:
        """Where a spread value has its channels; None for a value that is none."""
        return self._vectors[name][1] if name in self._vectors else None

    def made_by(self, name: str) -> Operation | None:
        """The operation behind a dense value."""
        return None if name in self._vectors else self.operations.get(self._names.get(name, name))

    def is_output(self, name: str) -> bool:
        return name in self._outputs

    def spread(self, name: str, vector: str, axis: int, shape: Shape) -> None:
        """`name` is `vector` with axes of size 1 between, its channels at `axis`."""
        self._vectors[name] = (vector, axis)
        self.shapes[name] = shape

    def alias(self, name: str, source: str) -> None:
        """`name` is another name of `source`."""
        self.shapes[name] = self.shapes[source]
        self._names[name] = self._names.get(source, source)
        if source in self._vectors:
            self._vectors[name] = self._vectors[source]

    def sizes(self, name: str) -> list[Size] | None:
        """A shape: constant or put together in the graph; None for what is none."""
        if name in self._sizes:
            return self._sizes[name]
        is_shape = self.is_weight(name) and len(self.shapes[name]) <= 1
        array = self.array(name) if is_shape else np.empty(0)
        return [int(size) for size in array.reshape(-1)] if array.dtype == np.int64 else None

    def set_sizes(self, name: str, sizes: list[Size]) -> None:
        self._sizes[name] = sizes

    def size_of(self, name: str, axis: int) -> Size:
        fixed = self.shapes[name][axis]
        source = self._vectors[name][0] if name in self._vectors else self._names.get(name, name)
        return (source, axis) if fixed is None else fixed

    def emit(self, name: str, kind: Kind, inputs: Sequence[str | None], shape: Shape, **settings: Any) -> str:
        """Append an operation that makes `name`, or give `name` to an equal one before it; the draft's name."""
        one = Operation(kind=kind, inputs=tuple(inputs), outputs=(name,), settings=settings)
        self.shapes[name] = shape
        key = json.dumps([kind, one.inputs, settings])
        if key in self._known and name not in self._outputs:
            self._names[name] = self._known[key]
        else:
            self.operations[name] = one
            self._known.setdefault(key, name)
        return self._names.get(name, name)

    def reshape(self, name: str, source: str, sizes: Sequence[Size]) -> None:
        before = self.shapes[source]
        after = _reshaped(before, sizes)
        vector = self.vector(source)
        wide = [axis for axis, size in enumerate(after) if axis and size != 1]
        if vector is not None and len(after) >= 2 and len(wide) == 1:
            channels = before[vector[1]]
            if channels is not None and after[wide[0]] == channels and after[0] == before[0]:
                if len(after) > 2:
                    self.spread(name, vector[0], wide[0], after)
                else:
                    self.alias(name, vector[0])
                return
        inputs = [self.value(source)]
        listed: list[Any] = []
        for size in sizes:
            if isinstance(size, tuple):
                if size[0] not in inputs:
                    inputs.append(size[0])
                listed.append([inputs.index(size[0]), size[1]])
            else:
                listed.append(size)
        self.emit(name, "reshape", inputs, after, sizes=listed)

    def elementwise(
        self, node: NodeProto, step: str, *names: str, arguments: Sequence[float | None] = ()
    ) -> None:
        """One pointwise step over values, vectors spread over them, and numbers."""
        output = node.output[0]
        vectors = {self._vectors.get(name, (None, None))[1] for name in names if not self.is_weight(name)}
        shape = _broadcast([self.shapes[name] for name in names if self.number(name) is None])
        axis = vectors.pop() if len(vectors) == 1 else None
        registers: list[str] = []
        constants: list[list[Any]] = []
        places: list[tuple[bool, int]] = []
        for name in names:
            number = self.number(name)
            if number is not None:
                places.append((False, len(constants)))
                constants.append(["constant", number])
                continue
            register = self._operand(node, name, shape, channel_axis(len(shape)) if axis is None else axis)
            if register not in registers:
                registers.append(register)
            places.append((True, registers.index(register)))
        if not registers:
            raise refused(node, "constants alone")
        indices = [place if is_value else len(registers) + place for is_value, place in places]
        program = json.dumps([*constants, [step, *indices, *arguments]])
        results = [len(registers) + len(constants)]
        if axis is None:
            self.emit(output, "pointwise", registers, shape, program=program, results=results)
            return
        made = self.emit(
            f"{output}.vector",
            "pointwise",
            registers,
            (shape[0], shape[axis]),
            program=program,
            results=results,
        )
        self.spread(output, made, axis, shape)

    def _operand(self, node: NodeProto, name: str, shape: Shape, axis: int) -> str:
        """What a pointwise operation reads for `name` so that it spreads over `shape` as ONNX does."""
        given = self.shapes[name]
        if _is_full(given, shape) and name not in self._vectors:
            return self.value(name)
        padded = (1,) * (len(shape) - len(given)) + given
        wide = {place for place, size in enumerate(padded) if size != 1 and place}
        fits = wide <= {axis} and padded[axis] == shape[axis]
        if fits and self.is_weight(name) and padded[0] == 1:
            flat = self.weight(name)
            channels = self._weights[flat].reshape(-1).numpy()
            return flat if len(given) == 1 else self.weight(f"{flat}.channels", channels)
        if fits and name in self._vectors and self._vectors[name][1] == axis:
            return self._vectors[name][0]
        if fits and not self.is_weight(name) and len(given) == len(shape):
            return self.value(name)
        raise refused(node, f"shape {_text(given)} beside {_text(shape)}")


Operator = Callable[[Lowering, NodeProto], None]


def attributes(node: NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _text(shape: Shape) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _is_full(given: Shape, shape: Shape) -> bool:
    pairs = zip(given, shape, strict=False)
    return len(given) == len(shape) and all(a == b or None in (a, b) and 1 not in (a, b) for a, b in pairs)


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    """Free sizes are taken for equal."""
    rank = max((len(shape) for shape in shapes), default=0)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    result: list[int | None] = []
    for sizes in zip(*padded, strict=True):
        fixed = {size for size in sizes if size is not None and size != 1}
        result.append(max(fixed) if fixed else None if None in sizes else 1)
    return tuple(result)


def _reshaped(before: Shape, sizes: Sequence[Size]) -> Shape:
    after = [
        None if isinstance(size, tuple) or size == -1 else before[axis] if size == 0 else size
        for axis, size in enumerate(sizes)
    ]
    if -1 in sizes and before[1:].count(None) == 0:
        place = list(sizes).index(-1)
        rest = [size for axis, size in enumerate(after) if axis != place]
        if place == 0 and None not in rest:
            inner = int(np.prod([size or 1 for size in before[1:]]))
            after[0] = before[0] if int(np.prod([size or 1 for size in rest])) == inner else None
        elif rest[0] == before[0] and None not in rest[1:]:
            inner = int(np.prod([size or 1 for size in before[1:]]))
            after[place] = inner // int(np.prod([size or 1 for size in rest[1:]]))
    return tuple(after)
