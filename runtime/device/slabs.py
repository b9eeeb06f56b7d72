"""Which rows of its inputs an operation needs for rows of its output, and how it runs on those alone.

A row is one position along the first spatial axis: a plane of a volume, a line of an image. Padding applies at the
volume's true ends only. Where an operation pads by itself, its slab is wider and the rows that saw padding inside the
volume are cropped; the others are the same sums as on the whole volume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from .program import Operation

Shapes = Mapping[str, tuple[int, ...]]
Rows = tuple[int, int]


@final
@dataclass(frozen=True)
class Local:
    """`operation` on `rows` of its inputs (None: all of it) makes the wanted rows, from its output's row `first` on."""

    operation: Operation
    rows: tuple[Rows | None, ...]
    first: int = 0


def is_local(operation: Operation, shapes: Shapes) -> bool:
    """Whether rows of the output need only rows nearby."""
    rank = len(shapes[operation.outputs[0]])
    if rank < 4 or operation.kind not in _LOCAL:
        return False
    if operation.kind in ("concat", "softmax"):
        return bool(operation.settings["axis"] % rank != 2)
    if operation.kind == "resize":
        corners = operation.settings["mode"] != "nearest" and operation.settings["align_corners"]
        return not corners and _factors(operation, shapes) is not None
    return True


def local(operation: Operation, shapes: Shapes, start: int, stop: int) -> Local:
    """Rows `start` to `stop` of the outputs of an operation for which `is_local`; `shapes` are those of whole values."""
    return _LOCAL[operation.kind](operation, shapes, start, stop)


def _first_only(
    operation: Operation, rows: Rows, first: int, settings: dict[str, Any] | None = None
) -> Local:
    if settings is not None:
        operation = operation.model_copy(update={"settings": {**operation.settings, **settings}})
    return Local(operation, (rows, *(None,) * (len(operation.inputs) - 1)), first)


def _same(operation: Operation, shapes: Shapes, start: int, stop: int) -> Local:
    depth = shapes[operation.outputs[0]][2]

    def rows(name: str | None) -> Rows | None:
        alike = name is not None and len(shapes[name]) >= 4 and shapes[name][2] == depth
        return (start, stop) if alike else None

    return Local(operation, tuple(rows(name) for name in operation.inputs))


def _window(
    operation: Operation, shapes: Shapes, start: int, stop: int, kernel: int, pads: list[int]
) -> Local:
    """A window of `kernel` rows: with the volume's own padding, or with none where it stays inside."""
    x, stride = operation.inputs[0], _numbers(operation.settings["stride"])[0]
    assert x is not None
    depth, padding = shapes[x][2], pads[0]
    low, high = start * stride - padding, (stop - 1) * stride - padding + kernel
    if low >= 0 and high <= depth:
        return _first_only(operation, (low, high), 0, {"padding": [0, *pads[1:]]} if padding else None)
    # Padded at both sides: from a multiple of the stride on, so that windows stand where they stood.
    # A window's rows at least: pooling refuses fewer.
    low = max(0, min(low, depth - kernel)) // stride * stride
    high = min(max(high, low + kernel), depth)
    return _first_only(operation, (low, high), start - low // stride)


def _convolution(operation: Operation, shapes: Shapes, start: int, stop: int) -> Local:
    weight, s = operation.inputs[1], operation.settings
    assert weight is not None
    kernel = s["dilation"][0] * (shapes[weight][2] - 1) + 1
    return _window(operation, shapes, start, stop, kernel, list(s["padding"]))


def _average_pool(operation: Operation, shapes: Shapes, start: int, stop: int) -> Local:
    kernel, s = _numbers(operation.settings["kernel"])[0], operation.settings
    axes = len(shapes[operation.outputs[0]]) - 2
    pads = _numbers(s["padding"])
    return _window(operation, shapes, start, stop, kernel, pads * axes if len(pads) == 1 else pads)


def _numbers(setting: int | Sequence[int]) -> list[int]:
    return [setting] if isinstance(setting, int) else list(setting)


def _input_head(operation: Operation, shapes: Shapes, start: int, stop: int) -> Local:
    x = operation.inputs[0]
    assert x is not None
    low, high = max(0, start - 1), min(shapes[x][2], stop + 1)
    return _first_only(operation, (low, high), start - low)


def _upsample_convolution(operation: Operation, shapes: Shapes, start: int, stop: int) -> Local:
    x = operation.inputs[0]
    assert x is not None
    # Rows 2i and 2i + 1 read i - 1, i and i, i + 1.
    low, high = max(0, (start - 1) // 2), min(shapes[x][2], stop // 2 + 1)
    return _first_only(operation, (low, high), start - 2 * low)


def _transposed_convolution(operation: Operation, shapes: Shapes, start: int, stop: int) -> Local:
    x, weight = operation.inputs[:2]
    assert x is not None and weight is not None
    s = operation.settings
    stride, padding, extra = s["stride"][0], s["padding"][0], s["output_padding"][0]
    reach = s["dilation"][0] * (shapes[weight][2] - 1)
    # Row i adds to the rows i * stride - padding + (0 .. reach).
    low = max(0, min(-((reach - start - padding) // stride), start // stride, shapes[x][2] - 1))
    # The last row that adds, and enough rows that the output is long enough.
    last = max((stop - 1 + padding) // stride, -((reach + extra + 1 - stop - 2 * padding) // stride))
    return _first_only(operation, (low, min(shapes[x][2], last + 1)), start - low * stride)


def _factors(operation: Operation, shapes: Shapes) -> tuple[int, ...] | None:
    """By how much each spatial axis grows; None where one does not grow by a whole number."""
    x = operation.inputs[0]
    assert x is not None
    before, after = shapes[x][2:], shapes[operation.outputs[0]][2:]
    if any(b % a for a, b in zip(before, after, strict=True)):
        return None
    return tuple(b // a for a, b in zip(before, after, strict=True))


def _resize(operation: Operation, shapes: Shapes, start: int, stop: int) -> Local:
    x = operation.inputs[0]
    factors = _factors(operation, shapes)
    assert x is not None and factors is not None
    factor = factors[0]
    if operation.settings["mode"] == "nearest":
        low, high = start // factor, (stop - 1) // factor + 1
    else:  # row o reads floor((o + 0.5) / factor - 0.5) and the next
        low = (2 * start + 1 - factor) // (2 * factor)
        high = (2 * stop - 1 - factor) // (2 * factor) + 2
    low, high = max(0, low), min(shapes[x][2], high)
    alone = operation.model_copy(
        update={"inputs": (x,), "settings": {**operation.settings, "scale": [float(f) for f in factors]}}
    )
    return Local(alone, ((low, high),), start - low * factor)


def _pad(operation: Operation, shapes: Shapes, start: int, stop: int) -> Local:
    x = operation.inputs[0]
    assert x is not None
    depth, widths = shapes[x][2], list(operation.settings["widths"])
    place = 2 * (len(shapes[x]) - 3)  # widths begin with the last axis
    if len(widths) <= place:
        return _same(operation, shapes, start, stop)
    before = widths[place]
    low = min(max(0, start - before), depth - 1)
    high = max(low + 1, min(stop - before, depth))
    widths[place] = max(0, before - start) if low == 0 else 0
    widths[place + 1] = max(0, stop - before - high)
    # The output begins with row `low` of the input, less the padding before it.
    return _first_only(operation, (low, high), start - (low + before - widths[place]), {"widths": widths})


_LOCAL: dict[str, Callable[[Operation, Shapes, int, int], Local]] = {
    "average_pool": _average_pool,
    "columns": _same,
    "concat": _same,
    "convolution": _convolution,
    "input_head": _input_head,
    "linear": _same,
    "pad": _pad,
    "pointwise": _same,
    "resize": _resize,
    "softmax": _same,
    "transposed_convolution": _transposed_convolution,
    "upsample_convolution": _upsample_convolution,
}
