"""What the passes ask of a draft: the shapes of its values, and the elementwise operations that they take in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from volcast.export.draft import Draft
from volcast.runtime.device.operations import dense, evaluate
from volcast.runtime.device.program import Operation

Shape = tuple[int, ...]

EXAMPLE = (3, 320, 64, 128, 192)
"""A size for each free axis of an input: none 1, none equal, and halved six times over still whole."""

SHAPE_ONLY = {"cast": 1, "volume": 1, "reshape": 1, "resize": 1}
"""Kinds of which the inputs from this place on give sizes or a type; their numbers are not read."""


def example_shapes(draft: Draft) -> dict[str, Shape]:
    """A shape for every value and weight, at sizes where different axes have different sizes.

    Two values that a program with free sizes adds have one shape, or one of them is spread over the other: which it
    is shows at any sizes above 1. Raises ValueError for an input of unknown shape and for operations that do not fit.
    """
    values: dict[str, Any] = {name: torch.empty_like(w, device="meta") for name, w in draft.weights.items()}
    for name in draft.inputs:
        if name not in draft.shapes:
            raise ValueError(
                f"[build] the shape of input {name} is not known; lower the program with its shapes"
            )
        sizes = [EXAMPLE[axis] if size is None else size for axis, size in enumerate(draft.shapes[name])]
        values[name] = dense(torch.empty(sizes, device="meta"))
    for operation in draft.operations:
        inputs = [None if name is None else values[name] for name in operation.inputs]
        results = evaluate(operation, inputs)
        values |= dict(zip(operation.outputs, map(dense, results), strict=True))
    return {name: tuple(value.shape) for name, value in values.items()}


def channel_axis(shape: Shape) -> int:
    """1 of volumes, the last of all else."""
    return 1 if len(shape) >= 4 else len(shape) - 1


def is_vector(shape: Shape, whole: Shape) -> bool:
    """One number a channel, `[C]`, or a sample and channel, `[N, C]`, of a tensor of shape `whole`."""
    n, channels = whole[0], whole[channel_axis(whole)]
    return shape != whole and shape in ((channels,), (n, channels))


def concat_parts(draft: Draft, name: str, shapes: dict[str, Shape]) -> tuple[str, str] | None:
    """The two tensors that a value is the concatenation of, along the channels; None for another value."""
    one = draft.producer.get(name)
    if one is None or one.kind != "concat" or len(one.inputs) != 2 or name in draft.outputs:
        return None
    shape = shapes[name]
    first, second = one.inputs
    along = one.settings["axis"] % len(shape) == channel_axis(shape)
    return (first, second) if along and first is not None and second is not None else None


def is_strided(draft: Draft, name: str) -> bool:
    """A column slice, or a view of one: its rows lie apart."""
    one = draft.producer.get(name)
    while one is not None and one.kind in ("tokens", "volume"):
        assert one.inputs[0] is not None
        one = draft.producer.get(one.inputs[0])
    return one is not None and one.kind == "columns"


def depends_on(draft: Draft, name: str, value: str) -> bool:
    """Whether `name` is `value` or computed from it."""
    seen, stack = set[str](), [name]
    while stack:
        current = stack.pop()
        if current == value:
            return True
        one = draft.producer.get(current)
        if one is not None and current not in seen:
            seen |= set(one.outputs)
            stack.extend(source for source in one.inputs if source is not None)
    return False


def reads_at(operation: Operation, name: str) -> list[int]:
    """The places at which an operation reads the numbers of a value, those that give sizes or a type left out."""
    places = [place for place, source in enumerate(operation.inputs) if source == name]
    return [place for place in places if place < SHAPE_ONLY.get(operation.kind, place + 1)]


def with_inputs(one: Operation, inputs: Sequence[str | None], outputs: tuple[str, ...] = ()) -> Operation:
    """The operation with other inputs, None at the end left out, and other outputs where given."""
    last = max((place for place, name in enumerate(inputs) if name is not None), default=-1)
    outputs = outputs or one.outputs
    return one.model_copy(update={"inputs": tuple(inputs[: last + 1]), "outputs": outputs})


def sum_of(operation: Operation | None) -> tuple[str, str] | None:
    """The two tensors that an elementwise operation adds, if that is all it does."""
    if operation is None or operation.kind != "pointwise" or len(operation.outputs) != 1:
        return None
    steps = json.loads(operation.settings["program"])
    count = len(operation.inputs)
    if len(steps) != 1 or steps[0][0] != "add" or list(operation.settings["results"]) != [count]:
        return None
    first, second = (operation.inputs[register] for register in steps[0][1:])
    return (first, second) if first is not None and second is not None else None


def silu_of(draft: Draft, name: str) -> str | None:
    """The value silu(`name`), where nothing else reads `name`."""
    reader = draft.only_consumer(name)
    if reader is None or reader.kind != "pointwise" or len(reader.inputs) != 1:
        return None
    alone = json.loads(reader.settings["program"]) == [["silu", 0]] and list(reader.settings["results"]) == [
        1
    ]
    return reader.outputs[0] if alone else None
