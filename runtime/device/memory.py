"""Where the values of a device program lie: one arena, planned before the first run.

A value lives from the operation that makes it to the last one that reads it or a view of it; inputs from the start,
outputs to the end. Values whose lives meet never share a byte. The packing is greedy, each buffer into the tightest
gap that lasts for its life (Pisarchyk and Lee, arXiv:2001.03288), under several orders, of which the smallest counts;
each is tried again with the buffer first that came to lie highest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .operations import dense as to_dense
from .operations import evaluate
from .program import VIEWS, DeviceProgram, Operation

ALIGNMENT = 256
"""Bytes. What cudaMalloc gives, so a value in an arena is aligned as one of its own would be."""

TRIES = 12
"""Packings from one order of buffers on; a UNet's step took up to ten."""

SIZES_ONLY = VIEWS | {"cast", "reshape", "resize"}
"""Kinds that read the sizes or the type of their further inputs, not the numbers."""

Spec = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class MemoryPlan:
    """`offsets`: of every value that is no view. `views`: a view -> the value or weight in whose memory it lies.
    `in_place`: a value -> the input of its operation whose memory it takes over. `live_bytes`: the most that is alive
    at once, which no arena can go below."""

    bytes: int
    offsets: Mapping[str, int]
    views: Mapping[str, str]
    in_place: Mapping[str, str]
    live_bytes: int


def empty(spec: Spec, device: torch.device | str) -> Tensor:
    """Memory of its own for a value, laid out as values are (`operations.dense`)."""
    shape, dtype = spec
    order = (shape[0], *shape[2:], shape[1]) if len(shape) >= 4 else shape
    x = torch.empty(order, dtype=dtype, device=device)
    return x.movedim(-1, 1) if len(shape) >= 4 else x


def place(arena: Tensor, offset: int, spec: Spec) -> Tensor:
    """The value of `spec` that begins at byte `offset` of a uint8 arena, laid out as values are."""
    shape, dtype = spec
    order = (shape[0], *shape[2:], shape[1]) if len(shape) >= 4 else shape
    x = arena[offset : offset + size_of(spec)].view(dtype).view(order)
    return x.movedim(-1, 1) if len(shape) >= 4 else x


def size_of(spec: Spec) -> int:
    """Bytes."""
    return math.prod(spec[0]) * spec[1].itemsize


def is_view(program: DeviceProgram, operation: Operation) -> bool:
    """Whether its output needs no memory. What the program returns is dense and its own, so a copy there."""
    return operation.kind in VIEWS and operation.outputs[0] not in program.outputs


def shapes(
    program: DeviceProgram, weights: Mapping[str, Tensor], inputs: Mapping[str, Spec]
) -> dict[str, Spec]:
    """The shape and dtype of every value, from running the program on tensors without memory.

    `weights` may lie on any device. Raises ValueError, naming the operation, for inputs or weights that it refuses;
    so an operation that runs has had its contract checked, strides included.
    """
    missing = [name for name in program.inputs if name not in inputs]
    missing += sorted(program.weights() - weights.keys())
    if missing:
        raise ValueError(f"[device program] {missing[0]} is missing: need every input and weight")
    values = {name: weights[name].to("meta") for name in program.weights()}
    values |= {name: empty(inputs[name], "meta") for name in program.inputs}
    for operation in program.operations:
        given = [None if name is None else values[name] for name in operation.inputs]
        try:
            results = evaluate(operation, given)
        except (ValueError, RuntimeError, LookupError, TypeError, ArithmeticError) as error:
            raise ValueError(f"[device program] {operation.kind} {operation.outputs[0]}: {error}") from error
        if len(results) != len(operation.outputs):
            raise ValueError(
                f"[device program] {operation.kind} {operation.outputs[0]}: makes {len(results)} values, "
                f"has {len(operation.outputs)} outputs"
            )
        as_is = is_view(program, operation)
        values |= {
            name: result if as_is else to_dense(result)
            for name, result in zip(operation.outputs, results, strict=True)
        }
    made = [*program.inputs, *(name for operation in program.operations for name in operation.outputs)]
    return {name: (tuple(values[name].shape), values[name].dtype) for name in made}


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """Memory for one value, and for those that take it over: alive from operation `start` to `end`, both included."""

    name: str
    bytes: int  # a multiple of ALIGNMENT
    start: int
    end: int


def plan(program: DeviceProgram, specs: Mapping[str, Spec], keep: frozenset[str] = frozenset()) -> MemoryPlan:
    """Offsets for all values of `shapes`. Inputs in `keep` are not overwritten; the others may be after their last read.

    The same program and sizes give the same plan.
    """
    unknown = keep - set(program.inputs)
    if unknown:
        raise ValueError(f"[device program] keep={min(unknown)}: need names of {', '.join(program.inputs)}")
    within = views(program)
    start = dict.fromkeys(program.inputs, -1)
    end = dict(start)
    forever = len(program.operations)
    for place_, operation in enumerate(program.operations):
        for name in operation.outputs:
            if name not in within:
                start[name] = end[name] = place_
        for name in read_values(program, operation):
            base = within.get(name, name)
            if base in end:
                end[base] = place_
    for name in keep | set(program.outputs):
        end[name] = forever
    in_place = _in_place(program, specs, within, end)
    owner: dict[str, str] = {}
    for name in start:
        taken = in_place.get(name)
        owner[name] = name if taken is None else owner[within.get(taken, taken)]
    last = {own: max(end[name] for name in start if owner[name] == own) for own in set(owner.values())}
    buffers = [
        Buffer(name=name, bytes=aligned(size_of(specs[name])), start=start[name], end=last[name])
        for name in start
        if owner[name] == name
    ]
    size, offsets = pack(buffers)
    return MemoryPlan(
        bytes=size,
        offsets={name: offsets[owner[name]] for name in start},
        views=within,
        in_place=in_place,
        live_bytes=live_bytes(buffers),
    )


def read_values(program: DeviceProgram, operation: Operation) -> list[str]:
    """The inputs whose numbers it reads when it runs; a view reads nothing."""
    if is_view(program, operation):
        return []
    names = operation.inputs[:1] if operation.kind in SIZES_ONLY else operation.inputs
    return [name for name in names if name is not None]


def views(program: DeviceProgram) -> dict[str, str]:
    """A view -> the value or weight in whose memory it lies."""
    found: dict[str, str] = {}
    for operation in program.operations:
        if is_view(program, operation):
            source = operation.inputs[0]
            assert source is not None
            found[operation.outputs[0]] = found.get(source, source)
    return found


def _in_place(
    program: DeviceProgram, specs: Mapping[str, Spec], within: Mapping[str, str], end: Mapping[str, int]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for place_, operation in enumerate(program.operations):
        taken = set[str]()
        for result, sources in takeovers(operation, specs, within).items():
            free = [name for name in sources if end[within.get(name, name)] == place_ and name not in taken]
            if free:
                taken.add(free[0])
                found[result] = free[0]
    return found


def takeovers(
    operation: Operation, specs: Mapping[str, Spec], within: Mapping[str, str]
) -> dict[str, list[str]]:
    """Of each result: the inputs whose memory it may take over where the operation is their last reader, in the order
    of preference. `within`: the program's `views`."""
    read = [name for name in operation.inputs if name is not None]
    if operation.kind == "pointwise":
        read = list(dict.fromkeys(read))
    bases = [within.get(name, name) for name in read]
    candidates = []
    for name in _overwritable(operation):
        base = within.get(name, name)
        # No weight; and what is read under two names is read in another order as well.
        if base in specs and bases.count(base) == 1 and size_of(specs[base]) == size_of(specs[name]):
            candidates.append(name)
    results = operation.outputs[:1] if operation.kind == "group_norm" else operation.outputs
    return {result: [name for name in candidates if specs[name] == specs[result]] for result in results}


def _overwritable(operation: Operation) -> list[str]:
    """The inputs that its results may overwrite, because each element is read before it is written.

    Of `group_norm` that is the first result alone: its addends are read again after the sum is written.
    `linear` adds its product to the residual.
    """
    places: tuple[int, ...] = ()
    if operation.kind == "pointwise":
        places = tuple(range(len(operation.inputs)))
    elif operation.kind == "linear":
        places = (3,)
    elif operation.kind == "layer_norm" or (
        operation.kind == "group_norm" and operation.inputs[5:6] in ((), (None,))
    ):
        places = (0, 4)
    named = [operation.inputs[place_] for place_ in places if place_ < len(operation.inputs)]
    return list(dict.fromkeys(name for name in named if name is not None))


def aligned(size: int) -> int:
    """Bytes, a whole number of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def live_bytes(buffers: Iterable[Buffer]) -> int:
    """The most bytes that are alive at once."""
    changes: dict[int, int] = {}
    for buffer in buffers:
        changes[buffer.start] = changes.get(buffer.start, 0) + buffer.bytes
        changes[buffer.end + 1] = changes.get(buffer.end + 1, 0) - buffer.bytes
    most = now = 0
    for time in sorted(changes):
        now += changes[time]
        most = max(most, now)
    return most


def pack(buffers: list[Buffer]) -> tuple[int, dict[str, int]]:
    """(bytes, offset of each buffer); of several orders the one that needs the least."""
    orders: list[Callable[[Buffer], tuple[int, ...]]] = [
        lambda b: (-b.bytes, b.start),
        lambda b: (-b.bytes * (b.end - b.start + 1), b.start),
        lambda b: (b.start - b.end, -b.bytes),
        lambda b: (b.start, -b.bytes),
    ]
    least, best = live_bytes(buffers), (0, dict[str, int]())
    for order in orders:
        waiting = sorted(buffers, key=lambda b: (*order(b), b.name))
        for _ in range(TRIES):
            found = _pack(waiting)
            best = found if not best[1] or found[0] < best[0] else best
            if best[0] == least:
                return best
            # What came to lie highest found no room: it goes first.
            highest = max(waiting, key=lambda b: found[1][b.name] + b.bytes)
            waiting = [highest, *(b for b in waiting if b is not highest)]
    return best


def _pack(buffers: list[Buffer]) -> tuple[int, dict[str, int]]:
    """Each buffer in turn into the smallest gap between those placed that it shares time with, else above them."""
    placed: list[tuple[int, Buffer]] = []  # by offset
    size = 0
    for buffer in buffers:
        below, gap, offset = 0, math.inf, -1
        for at, other in placed:
            if other.end < buffer.start or buffer.end < other.start:
                continue
            if buffer.bytes <= at - below < gap:
                gap, offset = at - below, below
            below = max(below, at + other.bytes)
        offset = below if offset < 0 else offset
        placed.append((offset, buffer))
        placed.sort(key=lambda entry: entry[0])
        size = max(size, offset + buffer.bytes)
    return size, {buffer.name: at for at, buffer in placed}
