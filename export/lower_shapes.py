"""The device operation of every ONNX operator that moves or names data: reshapes, ranges of channels, sizes."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from onnx import NodeProto, TensorProto

from .lowering import Lowering, Operator, Size, attributes, channel_axis, refused


def _transpose(w: Lowering, n: NodeProto) -> None:
    order = list(attributes(n)["perm"])
    shape = w.shapes[n.input[0]]
    w.emit(n.output[0], "transpose", [w.value(n.input[0])], tuple(shape[axis] for axis in order), order=order)


def _concat(w: Lowering, n: NodeProto) -> None:
    axis = attributes(n)["axis"]
    parts = [w.sizes(name) for name in n.input]
    if all(part is not None for part in parts):
        w.set_sizes(n.output[0], [size for part in parts for size in part or []])
        return
    shapes = [w.shapes[name] for name in n.input]
    axis %= len(shapes[0])
    widths = [shape[axis] for shape in shapes]
    total = None if None in widths else sum(width or 0 for width in widths)
    shape = (*shapes[0][:axis], total, *shapes[0][axis + 1 :])
    w.emit(n.output[0], "concat", [w.value(name) for name in n.input], shape, axis=axis)


def _columns(w: Lowering, n: NodeProto, name: str, axis: int, bounds: list[tuple[str, int, int]]) -> None:
    """Each of `bounds` is an output and its range of the channels of `name`."""
    shape = w.shapes[name]
    axis %= len(shape)
    spread = w.vector_axis(name)
    if axis != (channel_axis(len(shape)) if spread is None else spread):
        raise refused(n, f"a range along axis {axis} of {len(shape)}, not of the channels")
    for output, start, stop in bounds:
        part = (*shape[:axis], stop - start, *shape[axis + 1 :])
        if spread is None:
            w.emit(output, "columns", [w.value(name)], part, start=start, stop=stop)
        else:
            vector, _ = w.vector(name) or ("", 0)
            flat = (shape[0], stop - start)
            made = w.emit(f"{output}.vector", "columns", [vector], flat, start=start, stop=stop)
            w.spread(output, made, spread, part)


def _split(w: Lowering, n: NodeProto) -> None:
    axis = attributes(n).get("axis", 0)
    if len(n.input) > 1:
        widths = [int(width) for width in w.array(n.input[1])]
    else:
        size = w.shapes[n.input[0]][axis]
        if size is None or size % len(n.output):
            raise refused(n, f"{len(n.output)} equal parts of {size or 'a free size'}")
        widths = [size // len(n.output)] * len(n.output)
    ends = list(accumulate(widths))
    _columns(w, n, n.input[0], axis, list(zip(n.output, [0, *ends[:-1]], ends, strict=True)))


def _slice(w: Lowering, n: NodeProto) -> None:
    read = [w.sizes(name) or [] for name in n.input[1:]]
    numbers = [one[0] for one in read if len(one) == 1 and isinstance(one[0], int)]
    if len(numbers) != len(read) or len(read) < 3 or numbers[3:] not in ([], [1]):
        raise refused(n, "need one range of fixed bounds and step 1")
    axis = numbers[2] % len(w.shapes[n.input[0]])
    size = w.shapes[n.input[0]][axis]
    if size is None:
        raise refused(n, "a range along a free size")
    start, stop, _ = slice(numbers[0], numbers[1]).indices(size)
    _columns(w, n, n.input[0], axis, [(n.output[0], start, stop)])


def _gather(w: Lowering, n: NodeProto) -> None:
    """One of q, k, v: an index along an axis that a Reshape split off the channels and a Transpose moved."""
    index, axis = w.number(n.input[1]), attributes(n).get("axis", 0)
    turn = w.node_of.get(n.input[0])
    split = w.node_of.get(turn.input[0]) if turn is not None and turn.op_type == "Transpose" else None
    if (
        index is None
        or len(w.shapes[n.input[1]])
        or turn is None
        or split is None
        or split.op_type != "Reshape"
    ):
        raise refused(n, "need an index into channels that a reshape and a transpose arranged")
    order = list(attributes(turn)["perm"])
    place = order[axis]
    before, after = w.shapes[split.input[0]], w.shapes[split.output[0]]
    inner = after[place:]
    if (
        before[:-1] != after[:place]
        or place != len(before) - 1
        or None in inner
        or channel_axis(place + 1) != place
    ):
        raise refused(n, "need an index into channels")
    width = int(np.prod([size or 1 for size in inner[1:]]))
    part, heads = f"{n.output[0]}.columns", f"{n.output[0]}.heads"
    start = int(index) * width
    _columns(w, n, split.input[0], place, [(part, start, start + width)])
    w.reshape(heads, part, [*[0] * place, *[size or 1 for size in inner[1:]]])
    kept = [one - (one > place) for one in order if one != place]
    shape = w.shapes[heads]
    w.emit(n.output[0], "transpose", [w.value(heads)], tuple(shape[one] for one in kept), order=kept)


def _reshape(w: Lowering, n: NodeProto) -> None:
    sizes = w.sizes(n.input[1])
    if sizes is None:
        raise refused(n, "its sizes are no constants or sizes of tensors")
    w.reshape(n.output[0], n.input[0], sizes)


def _shape(w: Lowering, n: NodeProto) -> None:
    given, rank = attributes(n), len(w.shapes[n.input[0]])
    axes = range(rank)[given.get("start", 0) : given.get("end", rank)]
    w.set_sizes(n.output[0], [w.size_of(n.input[0], axis) for axis in axes])


def _axes(w: Lowering, n: NodeProto, rank: int) -> list[int]:
    return sorted(int(axis) % rank for axis in w.array(n.input[1]).reshape(-1))


def _unsqueeze(w: Lowering, n: NodeProto) -> None:
    rank = len(w.shapes[n.input[0]])
    sizes = [w.size_of(n.input[0], axis) for axis in range(rank)]
    for axis in _axes(w, n, rank + int(w.array(n.input[1]).size)):
        sizes.insert(axis, 1)
    w.reshape(n.output[0], n.input[0], _kept(sizes, n.input[0], w))


def _squeeze(w: Lowering, n: NodeProto) -> None:
    rank = len(w.shapes[n.input[0]])
    gone = _axes(w, n, rank)
    sizes = [w.size_of(n.input[0], axis) for axis in range(rank) if axis not in gone]
    w.reshape(n.output[0], n.input[0], _kept(sizes, n.input[0], w))


def _kept(sizes: list[Size], name: str, w: Lowering) -> list[Size]:
    """Sizes that stay in their place, as 0."""
    rank = len(w.shapes[name])
    return [
        0 if axis < rank and not isinstance(size, int) and size == w.size_of(name, axis) else size
        for axis, size in enumerate(sizes)
    ]


def _expand(w: Lowering, n: NodeProto) -> None:
    sizes, before = w.sizes(n.input[1]), w.shapes[n.input[0]]
    if sizes is None or not all(isinstance(size, int) for size in sizes):
        raise refused(n, "its sizes are free")
    numbers = [size for size in sizes if isinstance(size, int)]
    padded = (1,) * (len(numbers) - len(before)) + before
    shape = tuple(
        size if number == 1 else number for size, number in zip(padded[-len(numbers) :], numbers, strict=True)
    )
    w.emit(n.output[0], "expand", [w.value(n.input[0])], (*padded[: -len(numbers)], *shape), sizes=numbers)


def _cast(w: Lowering, n: NodeProto) -> None:
    """A stored half-precision weight is read as float32, as all are; values have the program's dtype."""
    if attributes(n)["to"] != TensorProto.FLOAT:
        raise refused(n, "a cast to another type than float")
    w.alias(n.output[0], n.input[0])


def _identity(w: Lowering, n: NodeProto) -> None:
    """A program's output is a tensor of its own."""
    copy = {"program": "[]", "results": [0]}
    if w.is_output(n.output[0]):
        w.emit(n.output[0], "pointwise", [w.value(n.input[0])], w.shapes[n.input[0]], **copy)
    else:
        w.alias(n.output[0], n.input[0])


SHAPE_OPERATORS: dict[str, Operator] = {
    "Cast": _cast,
    "Concat": _concat,
    "Expand": _expand,
    "Gather": _gather,
    "Identity": _identity,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
