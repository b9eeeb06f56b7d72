"""fold_bias: a bias moves to where adding it costs nothing.

A convolution's bias b is one number a channel on everything that is linear in its output, so it may be taken from the
convolution and given to all that reads it:

    norm(x + shift + residual)      shift + b, for x and for residual
    x @ W + c + residual            c + b @ W for x, c + b for residual
    views, x + other                what reads those

A shift is a constant (none is one of zeros), columns of a program input, or of a product in the program. To an input
(the schedule's `row`, `constants`) b is added once, before the run, through `offsets`; the columns must be this norm's
alone. GroupNorm's shift is free; LayerNorm takes a bias where it writes its sum anyway. Where one reader can take no
bias (a convolution: its padding is zero, not b; a program output) it stays. Exact up to rounding: sums in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from volcast.export.draft import Draft
from volcast.runtime.device.program import Operation

from .fuse_norm import RESIDUAL, SHIFT, norm_inputs
from .patterns import Shape, example_shapes, reads_at, sum_of, with_inputs

SOURCES = ("convolution", "transposed_convolution", "linear", "upsample_convolution")
BIAS = 2
"""The place of the bias among the inputs of each."""


@final
@dataclass(frozen=True)
class _Part:
    """`amount` [C], to be added to input `place` of the operation that makes `name`; to the table of program input
    `name`, from column `start` on, where place is None."""

    name: str
    place: int | None
    amount: Tensor
    start: int = 0


class _Stays(Exception):
    """A reader can take no bias."""


def fold_bias(draft: Draft) -> Draft:
    """Every bias that all readers of the output can take."""
    shapes = example_shapes(draft)
    for name in [one.outputs[0] for one in draft.operations if one.kind in SOURCES]:
        one = draft.producer[name]
        bias = bias_of(one, shapes)
        if bias is None:
            continue
        try:
            parts = list(_readers(draft, shapes, name, draft.weights[bias].double()))
        except _Stays:
            continue
        draft = _given(draft, shapes, one, parts)
    return draft


def bias_of(one: Operation, shapes: dict[str, Shape]) -> str | None:
    """The bias of an operation, one number a channel of its output where a program's values have their channels."""
    if one.kind not in SOURCES or len(one.inputs) <= BIAS:
        return None
    # A convolution along one axis leaves `N C L`; other readers take its last axis for the channels.
    sideways = one.kind != "linear" and len(shapes[one.outputs[0]]) < 4
    return None if sideways else one.inputs[BIAS]


def _readers(draft: Draft, shapes: dict[str, Shape], name: str, b: Tensor) -> Iterator[_Part]:
    """What has to be added where, when b is taken from a value. Raises _Stays."""
    if name in draft.outputs:
        raise _Stays
    for reader in draft.consumers.get(name, ()):
        places = reads_at(reader, name)
        # A pointwise operation is looked at as a whole: a sum may read a value twice.
        for place in places[:1] if reader.kind == "pointwise" else places:
            yield from _reader(draft, shapes, reader, place, b)


def _reader(
    draft: Draft, shapes: dict[str, Shape], reader: Operation, place: int, b: Tensor
) -> Iterator[_Part]:
    result = reader.outputs[0]
    match reader.kind:
        case "group_norm" | "layer_norm" if place in (0, RESIDUAL):
            if reader.kind == "layer_norm" and len(reader.outputs) < 2:
                raise _Stays
            yield _shift(draft, shapes, reader, b)
        case "linear" if place in (0, 3) and reader.inputs[1] in draft.weights:
            weight = draft.weights[reader.inputs[1] or ""]
            b = b @ weight.double() if place == 0 else b
            if len(reader.inputs) > BIAS and reader.inputs[BIAS] in draft.weights:
                yield _Part(result, BIAS, b)
            else:
                yield from _readers(draft, shapes, result, b)
        case "tokens" | "volume":
            yield from _readers(draft, shapes, result, b)
        case "columns":
            yield from _readers(draft, shapes, result, b[reader.settings["start"] : reader.settings["stop"]])
        case "pointwise" if (
            sum_of(reader) is not None and shapes[result] == shapes[reader.inputs[place] or ""]
        ):
            added = sum_of(reader) or ()
            for _ in range(added.count(reader.inputs[place] or "")):
                yield from _readers(draft, shapes, result, b)
        case _:
            raise _Stays


def _shift(draft: Draft, shapes: dict[str, Shape], norm: Operation, b: Tensor) -> _Part:
    """Where a norm's shift grows by b."""
    shift = norm_inputs(norm)[SHIFT]
    if shift is None or shift in draft.weights:
        return _Part(norm.outputs[0], SHIFT, b)
    if len(shapes[shift]) != 2 or draft.only_consumer(shift) != norm or norm.inputs.count(shift) > 1:
        raise _Stays
    base, start, made = shift, 0, draft.producer.get(shift)
    if made is not None and made.kind == "columns":
        base, start = made.inputs[0] or "", made.settings["start"]
        others = [one for one in draft.consumers[base] if one != made]
        apart = all(
            one.kind == "columns"
            and (one.settings["stop"] <= start or one.settings["start"] >= made.settings["stop"])
            for one in others
        )
        if base in draft.outputs or not apart or len(shapes[base]) != 2:
            raise _Stays
    if base in draft.inputs:
        if draft.shapes[base][1] is None:  # an offset is as wide as the table
            raise _Stays
        return _Part(base, None, b, start)
    product = draft.producer[base]
    if product.kind != "linear" or len(product.inputs) <= BIAS or product.inputs[BIAS] not in draft.weights:
        raise _Stays
    wide = torch.zeros(shapes[base][1], dtype=torch.float64)
    wide[start : start + len(b)] = b
    return _Part(base, BIAS, wide)


def _given(draft: Draft, shapes: dict[str, Shape], source: Operation, parts: list[_Part]) -> Draft:
    """The draft with the bias of `source` taken away and the parts added."""
    changed = {source.outputs[0]: _without_bias(source)}
    weights: dict[str, Tensor] = {}
    offsets = dict(draft.offsets)
    known = dict(draft.weights)
    for part in parts:
        if part.place is None:
            name = f"{part.name}.offset"
            old = known.get(offsets.get(part.name, ""), torch.zeros(shapes[part.name][1]))
            total = old.double()
            total[part.start : part.start + len(part.amount)] += part.amount
            offsets[part.name] = name
        else:
            one = changed.get(part.name, draft.producer[part.name])
            inputs = norm_inputs(one)
            name = f"{one.outputs[0]}.{'shift' if part.place == SHIFT else 'bias'}"
            before = inputs[part.place]
            total = part.amount if before is None else known[before].double() + part.amount
            inputs[part.place] = name
            changed[part.name] = with_inputs(one, inputs)
        weights[name] = known[name] = total.float()
    operations = [changed.get(one.outputs[0], one) for one in draft.operations]
    return draft.edited(operations, weights, offsets)


def _without_bias(source: Operation) -> Operation:
    inputs = list(source.inputs)
    inputs[BIAS] = None
    return with_inputs(source, inputs)
