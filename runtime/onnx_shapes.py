"""The shape of every value of an ONNX program at fixed sizes, found without running it and without the onnx package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from .onnx_graph import DTYPES, Node, OnnxGraph

Shape = tuple[int, ...]


@final
@dataclass(frozen=True)
class Sized:
    """A value's shape and dtype."""

    shape: Shape
    dtype: str

    @property
    def bytes(self) -> int:
        size = 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize
        return math.prod(self.shape) * size


def sized_values(graph: OnnxGraph, shapes: Mapping[str, Shape]) -> dict[str, Sized]:
    """Every value and constant of `graph` by name, for inputs of these shapes.

    Raises ValueError for an operator that is not known here, and for shapes that do not fit together.
    """
    walk = _Walk({name: Sized(tuple(shapes[name]), dtype) for name, dtype in graph.inputs.items()})
    for name, constant in graph.constants.items():
        walk.known[name] = Sized(constant.shape, constant.dtype)
        if constant.values is not None:
            walk.numbers[name] = constant.values
    for node in graph.nodes:
        rule = _RULES.get(node.kind)
        if rule is None:
            raise ValueError(f"[memory] the sizes that {node.kind} makes are not known; leave --memory out")
        try:
            made = rule(walk, node)
        except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"[memory] {node.kind} {node.outputs[0]} does not fit its inputs ({error!r}); give another size, or "
                "export the model again with `volcast export`"
            ) from error
        walk.known |= {name: one for name, one in zip(node.outputs, made, strict=False) if name}
    return walk.known


@final
@dataclass
class _Walk:
    """What is known so far: of every value its size, of values that hold sizes the numbers."""

    known: dict[str, Sized]
    numbers: dict[str, NDArray[Any]] = field(default_factory=dict)

    def shape(self, node: Node, index: int) -> Shape:
        return self.known[node.inputs[index]].shape

    def like(self, node: Node, shape: Sequence[int], dtype: str | None = None) -> list[Sized]:
        """The dtype of the first input where none is given."""
        return [Sized(tuple(int(size) for size in shape), dtype or self.known[node.inputs[0]].dtype)]

    def values(self, node: Node, index: int) -> list[Any] | None:
        """The numbers of an input; None where it is left out."""
        if index >= len(node.inputs) or not node.inputs[index]:
            return None
        return list(np.atleast_1d(self.numbers[node.inputs[index]]).tolist())

    def axes(self, node: Node, index: int, otherwise: Sequence[int] = ()) -> list[int]:
        """Axes given as an input or, before opset 13, as an attribute."""
        return self.values(node, index) or list(node.numbers("axes", tuple(otherwise)))


Rule = Callable[[_Walk, Node], list[Sized]]


def _same(walk: _Walk, node: Node) -> list[Sized]:
    return walk.like(node, walk.shape(node, 0))


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.floor_divide,
}


def _elementwise(walk: _Walk, node: Node) -> list[Sized]:
    given = [name for name in node.inputs if name]
    if node.kind in _ARITHMETIC and all(name in walk.numbers for name in given):
        walk.numbers[node.outputs[0]] = _ARITHMETIC[node.kind](*(walk.numbers[name] for name in given))
    shape = np.broadcast_shapes(*(walk.known[name].shape for name in given))
    dtype = walk.known[given[-1]].dtype  # Where has its condition first
    return walk.like(node, shape, "bool" if node.kind in _COMPARISONS else dtype)


def _shape(walk: _Walk, node: Node) -> list[Sized]:
    found = walk.shape(node, 0)
    found = found[node.number("start", 0) : node.number("end", len(found))]
    walk.numbers[node.outputs[0]] = np.array(found, np.int64)
    return walk.like(node, (len(found),), "int64")


def _cast(walk: _Walk, node: Node) -> list[Sized]:
    if node.inputs[0] in walk.numbers:
        walk.numbers[node.outputs[0]] = walk.numbers[node.inputs[0]]
    return walk.like(node, walk.shape(node, 0), DTYPES[node.number("to", 1)])


def _concat(walk: _Walk, node: Node) -> list[Sized]:
    shapes = [walk.shape(node, index) for index in range(len(node.inputs))]
    axis = node.number("axis", 0) % len(shapes[0])
    if all(name in walk.numbers for name in node.inputs):
        walk.numbers[node.outputs[0]] = np.concatenate([walk.numbers[name] for name in node.inputs], axis)
    total = sum(shape[axis] for shape in shapes)
    return walk.like(node, (*shapes[0][:axis], total, *shapes[0][axis + 1 :]))


def _split(walk: _Walk, node: Node) -> list[Sized]:
    shape = walk.shape(node, 0)
    axis, count = node.number("axis", 0) % len(shape), len(node.outputs)
    part = -(-shape[axis] // count)
    even = [part] * (count - 1) + [shape[axis] - part * (count - 1)]
    widths = walk.values(node, 1) or even
    return [walk.like(node, (*shape[:axis], width, *shape[axis + 1 :]))[0] for width in widths]


def _slice(walk: _Walk, node: Node) -> list[Sized]:
    shape = list(walk.shape(node, 0))
    starts, ends = walk.values(node, 1) or [], walk.values(node, 2) or []
    axes = walk.values(node, 3) or list(range(len(starts)))
    steps = walk.values(node, 4) or [1] * len(starts)
    cut = [slice(None)] * len(shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cut[axis] = slice(start, end, step)
        shape[axis] = len(range(*cut[axis].indices(shape[axis])))
    if node.inputs[0] in walk.numbers:
        walk.numbers[node.outputs[0]] = walk.numbers[node.inputs[0]][tuple(cut)]
    return walk.like(node, shape)


def _gather(walk: _Walk, node: Node) -> list[Sized]:
    shape, indices = walk.shape(node, 0), walk.shape(node, 1)
    axis = node.number("axis", 0) % len(shape)
    if all(name in walk.numbers for name in node.inputs):
        taken = walk.numbers[node.inputs[0]], walk.numbers[node.inputs[1]]
        walk.numbers[node.outputs[0]] = np.take(*taken, axis=axis)
    return walk.like(node, (*shape[:axis], *indices, *shape[axis + 1 :]))


def _unsqueeze(walk: _Walk, node: Node) -> list[Sized]:
    shape, axes = list(walk.shape(node, 0)), walk.axes(node, 1)
    for axis in sorted(axis % (len(shape) + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    if node.inputs[0] in walk.numbers:
        walk.numbers[node.outputs[0]] = walk.numbers[node.inputs[0]].reshape(shape)
    return walk.like(node, shape)


def _squeeze(walk: _Walk, node: Node) -> list[Sized]:
    shape = walk.shape(node, 0)
    ones = [axis for axis, size in enumerate(shape) if size == 1]
    axes = {axis % len(shape) for axis in walk.axes(node, 1, ones)}
    kept = [size for axis, size in enumerate(shape) if axis not in axes]
    if node.inputs[0] in walk.numbers:
        walk.numbers[node.outputs[0]] = walk.numbers[node.inputs[0]].reshape(kept)
    return walk.like(node, kept)


def _reshape(walk: _Walk, node: Node) -> list[Sized]:
    before, wanted = walk.shape(node, 0), walk.values(node, 1) or []
    shape = [before[place] if size == 0 and not node.number("allowzero", 0) else size
             for place, size in enumerate(wanted)]  # fmt: skip
    if -1 in shape:
        shape[shape.index(-1)] = math.prod(before) // -math.prod(shape)
    if math.prod(shape) != math.prod(before):
        raise ValueError(f"{before} as {tuple(wanted)}")
    return walk.like(node, shape)


def _flatten(walk: _Walk, node: Node) -> list[Sized]:
    shape, axis = walk.shape(node, 0), node.number("axis", 1)
    return walk.like(node, (math.prod(shape[:axis]), math.prod(shape[axis:])))


def _expand(walk: _Walk, node: Node) -> list[Sized]:
    return walk.like(node, np.broadcast_shapes(walk.shape(node, 0), tuple(walk.values(node, 1) or ())))


def _transpose(walk: _Walk, node: Node) -> list[Sized]:
    shape = walk.shape(node, 0)
    order = node.numbers("perm", tuple(reversed(range(len(shape)))))
    return walk.like(node, [shape[axis] for axis in order])


def _matmul(walk: _Walk, node: Node) -> list[Sized]:
    a, b = walk.shape(node, 0), walk.shape(node, 1)
    return walk.like(node, (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1]))


def _gemm(walk: _Walk, node: Node) -> list[Sized]:
    a, b = walk.shape(node, 0), walk.shape(node, 1)
    return walk.like(node, (a[node.number("transA", 0)], b[1 - node.number("transB", 0)]))


def _einsum(walk: _Walk, node: Node) -> list[Sized]:
    terms, _, result = str(node.attributes["equation"]).replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for index, term in enumerate(terms.split(",")):
        sizes |= zip(term, walk.shape(node, index), strict=True)
    return walk.like(node, [sizes[letter] for letter in result])


def _window(walk: _Walk, node: Node, kernel: Sequence[int], channels: int) -> list[Sized]:
    shape = walk.shape(node, 0)
    dims = len(shape) - 2
    strides, dilations = node.numbers("strides", (1,) * dims), node.numbers("dilations", (1,) * dims)
    pads = node.numbers("pads", (0,) * 2 * dims)
    up = node.number("ceil_mode", 0)
    sizes = []
    for axis in range(dims):
        room = shape[2 + axis] + pads[axis] + pads[dims + axis] - dilations[axis] * (kernel[axis] - 1) - 1
        sizes.append((room + up * (strides[axis] - 1)) // strides[axis] + 1)
    return walk.like(node, (shape[0], channels, *sizes))


def _convolution(walk: _Walk, node: Node) -> list[Sized]:
    weight = walk.shape(node, 1)
    return _window(walk, node, weight[2:], weight[0])


def _pool(walk: _Walk, node: Node) -> list[Sized]:
    return _window(walk, node, node.numbers("kernel_shape", ()), walk.shape(node, 0)[1])


def _transposed_convolution(walk: _Walk, node: Node) -> list[Sized]:
    shape, weight = walk.shape(node, 0), walk.shape(node, 1)
    dims = len(shape) - 2
    none, ones = (0,) * dims, (1,) * dims
    strides, dilations = node.numbers("strides", ones), node.numbers("dilations", ones)
    pads, extra = node.numbers("pads", none * 2), node.numbers("output_padding", none)
    sizes = [
        strides[i] * (shape[2 + i] - 1) + extra[i] + dilations[i] * (weight[2 + i] - 1) + 1 - pads[i] - pads[dims + i]
        for i in range(dims)
    ]  # fmt: skip
    return walk.like(node, (shape[0], weight[1] * node.number("group", 1), *sizes))


def _resize(walk: _Walk, node: Node) -> list[Sized]:
    shape, scales, sizes = walk.shape(node, 0), walk.values(node, 2), walk.values(node, 3)
    if sizes is None:
        sizes = [math.floor(size * scale) for size, scale in zip(shape, scales or (), strict=True)]
    return walk.like(node, sizes)


def _pad(walk: _Walk, node: Node) -> list[Sized]:
    shape, widths = walk.shape(node, 0), walk.values(node, 1) or []
    rank = len(shape)
    return walk.like(node, [size + widths[axis] + widths[rank + axis] for axis, size in enumerate(shape)])


def _reduce(walk: _Walk, node: Node) -> list[Sized]:
    shape = walk.shape(node, 0)
    axes = {axis % len(shape) for axis in walk.axes(node, 1, range(len(shape)))}
    kept = node.number("keepdims", 1)
    sizes = [1 if axis in axes else size for axis, size in enumerate(shape) if kept or axis not in axes]
    return walk.like(node, sizes)


def _arg(walk: _Walk, node: Node) -> list[Sized]:
    shape, kept = walk.shape(node, 0), node.number("keepdims", 1)
    axis = node.number("axis", 0) % len(shape)
    return walk.like(node, (*shape[:axis], *((1,) if kept else ()), *shape[axis + 1 :]), "int64")


def _quantize(walk: _Walk, node: Node) -> list[Sized]:
    zero = len(node.inputs) > 2 and node.inputs[2]
    asked = DTYPES.get(node.number("output_dtype", 0), "uint8")
    return walk.like(node, walk.shape(node, 0), walk.known[zero].dtype if zero else asked)


def _dequantize(walk: _Walk, node: Node) -> list[Sized]:
    return walk.like(node, walk.shape(node, 0), walk.known[node.inputs[1]].dtype)


_COMPARISONS = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
UNARY = frozenset({
    "Abs", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "Identity", "LeakyRelu", "Log",
    "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sin", "Softplus", "Sqrt", "Tanh",
})  # fmt: skip
"""Operators that work on every number by itself."""
BINARY = frozenset({"Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub", "Where"})
"""The same, of several inputs that are spread over one another."""
NORMS = frozenset({"GroupNormalization", "InstanceNormalization", "LayerNormalization", "BatchNormalization"})
VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators that change no number and no order."""

_RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY | NORMS | {"Softmax", "LogSoftmax", "Dropout"}, _same),
    **dict.fromkeys(BINARY | _COMPARISONS, _elementwise),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceSumSquare"), _reduce),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    "AveragePool": _pool,
    "Cast": _cast,
    "Concat": _concat,
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "DequantizeLinear": _dequantize,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "Pad": _pad,
    "QuantizeLinear": _quantize,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
