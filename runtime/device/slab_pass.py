"""Which operations run in a slab of a volume, on which rows, and how; the passes are in `runtime/slab_schedule.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from .operations import dense
from .program import Operation
from .slabs import Local, Rows, Shapes, local

Apply = Callable[[Operation, Sequence[Tensor | None]], list[Tensor]]
"""Runs one operation; on `meta` it allocates what it allocates on the device."""


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
