"""The passes over a volume, and which operations run in a slab of one, on which rows.

A pass makes one operation's outputs slab by slab: it stores them, takes their statistics, or both. What they need and
is not stored is made anew in every slab, on the rows that something in the slab reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from .operations import dense
from .program import Operation
from .slab_program import SlabProgram
from .slabs import Local, Rows, Shapes, local

Apply = Callable[[Operation, Sequence[Tensor | None]], list[Tensor]]
"""Runs one operation; on `meta` it allocates what it allocates on the device."""


@final
@dataclass(frozen=True, kw_only=True)
class Pass:
    """Runs the operations `indices`, in order, and keeps outputs of the last; none: statistics of inputs only.

    `height`: rows of a slab; 0: everything at once. `stores`: outputs that are kept whole. `moments`: values whose
    statistics are taken. Then: `merges`, the norms that all statistics are known for; `forgets`, the statistics that
    no later norm needs; `frees`, the stored values that nothing reads later.
    """

    indices: tuple[int, ...]
    height: int
    stores: tuple[str, ...]
    moments: tuple[str, ...]
    merges: tuple[int, ...]
    forgets: tuple[str, ...]
    frees: tuple[str, ...]


def schedule(program: SlabProgram, whole: Collection[int], stored: Collection[str]) -> list[Pass]:
    """The passes that store `stored`, every one at height 0. `whole`: operations that need whole inputs.

    The order is the program's: a pass reads what earlier ones stored, and norms whose statistics earlier ones took.
    """
    parts = {part for norm in program.norms for part in norm.parts}
    made = {name for operation in program.operations for name in operation.outputs}
    given = tuple(name for name in program.inputs if name in parts)
    found: list[tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]] = [((), (), given)] if given else []
    available: set[str] = set()
    for index, operation in enumerate(program.operations):
        stores = tuple(name for name in operation.outputs if name in stored)
        moments = tuple(name for name in operation.outputs if name in parts)
        if stores or moments or index in whole:
            found.append((chain(program.operations, index, made - available), stores, moments))
            available |= set(stores)
    taken: set[str] = set()
    there = set(program.inputs) | program.weights()
    merged_in: dict[int, int] = {}
    for place, (_, stores, moments) in enumerate(found):
        taken |= set(moments)
        there |= set(stores)
        for n, norm in enumerate(program.norms):
            if n not in merged_in and taken.issuperset(norm.parts) and norm.shift in {None, *there}:
                merged_in[n] = place
    forgotten = {part: place for n, place in sorted(merged_in.items(), key=lambda item: item[1])
                 for part in program.norms[n].parts}  # fmt: skip
    last = {name: place for place, (indices, stores, _) in enumerate(found)
            for name in (*stores, *(name for index in indices for name in program.operations[index].inputs))}  # fmt: skip
    last |= {program.norms[n].shift or "": max(place, last.get(program.norms[n].shift or "", 0))
             for n, place in merged_in.items()}  # fmt: skip
    kept = set(program.outputs)
    return [
        Pass(
            indices=indices, height=0, stores=stores, moments=moments,
            merges=tuple(n for n, at in merged_in.items() if at == place),
            forgets=tuple(part for part, at in forgotten.items() if at == place),
            frees=tuple(name for name, at in last.items() if at == place and name in available and name not in kept),
        )
        for place, (indices, stores, moments) in enumerate(found)
    ]  # fmt: skip


def chain(operations: Sequence[Operation], target: int, missing: Collection[str]) -> tuple[int, ...]:
    """The operations that a pass runs, in order: what the target needs of the values that are missing."""
    wanted = set(operations[target].outputs)
    found = []
    for index in range(target, -1, -1):
        if not wanted.isdisjoint(operations[index].outputs):
            found.append(index)
            wanted |= {name for name in operations[index].inputs if name is not None and name in missing}
    return tuple(reversed(found))


@final
@dataclass(frozen=True)
class SlabStep:
    """One operation in a slab. `rows` of its outputs (None: all, of an operation that needs whole inputs); `release`:
    the values that nothing in the slab reads any more."""

    index: int
    local: Local
    rows: Rows | None
    release: tuple[str, ...]


def slab_steps(
    operations: Sequence[Operation], indices: Sequence[int], shapes: Shapes, rows: Rows | None
) -> list[SlabStep]:
    """The steps that make `rows` of the last operation's outputs."""
    made = {name for index in indices for name in operations[index].outputs}
    wanted: dict[str, Rows | None] = dict.fromkeys(operations[indices[-1]].outputs, rows)
    read = set(wanted)
    steps: list[SlabStep] = []
    for index in reversed(indices):
        operation = operations[index]
        asked = [wanted[name] for name in operation.outputs if name in wanted]
        bounds = [one for one in asked if one is not None]
        out = (min(a for a, _ in bounds), max(b for _, b in bounds)) if bounds else None
        part = (
            Local(operation, (None,) * len(operation.inputs))
            if out is None
            else local(operation, shapes, *out)
        )
        for name, need in zip(part.operation.inputs, part.rows, strict=True):
            if name in made and name is not None:
                assert need is not None, f"{name} is read whole and has to be stored"
                before = wanted.get(name) or need
                wanted[name] = (min(before[0], need[0]), max(before[1], need[1]))
        # Backwards, so the first reader met is the last to run; what nothing reads goes at once.
        names = [
            name for name in (*part.operation.inputs, *operation.outputs) if name in made and name not in read
        ]
        release = tuple(dict.fromkeys(name for name in names if name is not None))
        read |= set(release)
        steps.append(SlabStep(index, part, out, release))
    return steps[::-1]


Source = tuple[Tensor, int]
"""A value, or rows of it, and the row with which it begins."""


def compute(apply: Apply, step: SlabStep, sources: Sequence[Source | None]) -> list[Tensor]:
    """The wanted rows of a step's outputs."""
    inputs = [
        source
        and (
            source[0] if rows is None else dense(source[0].narrow(2, rows[0] - source[1], rows[1] - rows[0]))
        )
        for source, rows in zip(sources, step.local.rows, strict=True)
    ]
    outputs = apply(step.local.operation, inputs)
    del inputs
    if step.rows is None:
        return [dense(output) for output in outputs]
    count = step.rows[1] - step.rows[0]
    return [dense(output.narrow(2, step.local.first, count)) for output in outputs]
