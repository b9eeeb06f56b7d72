"""How to run a program of volumes within a memory limit: which values are stored whole, and how tall slabs are.

Stored values take memory; those that are not stored are made anew in every pass that reads them, and low slabs make
more rows twice. The plan is the one of least work, found by trying, whose peak fits; the peak is a simulation of what
the run allocates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .cost import Described
from .operations import evaluate
from .program import DeviceProgram
from .slab_pass import Apply, Pass
from .slab_program import SlabProgram, take_norms_apart
from .slab_simulation import Outcome, Simulation

_SMALL = 1 / 256
"""Of the limit: whether such values are stored is not tried one by one."""


@final
@dataclass(frozen=True, kw_only=True)
class SlabPlan:
    """What SlabDecoder runs.

    Attributes:
        inputs: shape and dtype of every input.
        shapes, dtypes: of every value and weight, whole.
        peak_bytes: of all tensors at once: weights, inputs, stored values, slabs.
        milliseconds: the passes at an H100's practical peaks; `whole_milliseconds`: every operation once.
    """

    program: SlabProgram
    inputs: Described
    passes: tuple[Pass, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    peak_bytes: int
    milliseconds: float
    whole_milliseconds: float


def plan_slabs(
    program: DeviceProgram,
    weights: Mapping[str, Tensor],
    inputs: Described,
    limit_bytes: int,
    apply: Apply = evaluate,
) -> SlabPlan:
    """The plan with the least work whose peak is at most `limit_bytes`; weights and inputs count.

    `weights` may lie anywhere, on `meta` too. `apply` is what will run: the plan has its allocations on `meta`. What it
    takes out of sight (cuDNN's workspace) is the caller's to hold back.

    Raises ValueError, with the smallest limit that would do, where none fits.
    """
    parts = take_norms_apart(program, weights)
    simulation = Simulation(parts, weights, inputs, apply)
    forced = simulation.forced()
    levels, others = _candidates(parts, simulation, forced)
    starts = []
    for threshold in [*sorted({simulation.bytes(name) for name in levels}, reverse=True), 0]:
        stored = frozenset(name for name in levels if simulation.bytes(name) <= threshold)
        starts.append((simulation.run(forced | stored, limit_bytes), stored))
    fitting = [start for start in starts if start[0].peak <= limit_bytes]
    if not fitting:
        raise ValueError(_too_small(limit_bytes, min(start[0].peak for start in starts), inputs))
    large = [name for name in (*levels, *others) if simulation.bytes(name) > limit_bytes * _SMALL]
    search = _Search(simulation, forced, limit_bytes)
    found = [*fitting[:1], *search.smaller(*starts[0], large)]
    best = min((search.better(*start, large) for start in found), key=lambda one: one.milliseconds)
    return SlabPlan(
        program=parts, inputs=inputs, passes=best.passes, shapes=simulation.shapes, dtypes=simulation.dtypes,
        peak_bytes=int(best.peak), milliseconds=best.milliseconds,
        whole_milliseconds=simulation.whole_milliseconds(),
    )  # fmt: skip


def _too_small(limit: int, smallest: float, inputs: Described) -> str:
    given = ", ".join(f"{name} {tuple(shape)}" for name, (shape, _) in inputs.items())
    if math.isinf(smallest):
        return f"[decode] {given}: a plane has over 2^31 elements; decode a smaller volume"
    return (
        f"[decode] memory_limit={limit}: need at least {int(smallest)} bytes for {given}; "
        "raise the limit or decode a smaller volume"
    )


def _candidates(
    program: SlabProgram, simulation: Simulation, forced: set[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Values that may be stored: (those of norms and of several readers, what else is added to another volume)."""
    readers: dict[str, int] = {}
    added: set[str] = set()
    for operation in program.operations:
        volumes = {
            name for name in operation.inputs if name is not None and len(simulation.shapes[name]) >= 4
        }
        for name in volumes:
            readers[name] = readers.get(name, 0) + 1
        if operation.kind in ("pointwise", "linear") and len(volumes) > 1:
            added |= volumes
    parts = {part for norm in program.norms for part in norm.parts}
    made = [name for operation in program.operations for name in operation.outputs if name not in forced]
    levels = tuple(name for name in made if name in parts or readers.get(name, 0) > 1)
    return levels, tuple(name for name in made if name in added and name not in levels)


_Start = tuple[Outcome, frozenset[str]]
"""A plan and what it stores."""


@final
@dataclass(frozen=True)
class _Search:
    """Of all ways to store one value more or one less, the best, again and again."""

    simulation: Simulation
    forced: set[str]
    limit: int

    def _others(self, stored: frozenset[str], names: Iterable[str]) -> list[_Start]:
        sets = [stored ^ {name} for name in names]
        return [(self.simulation.run(self.forced | one, self.limit), one) for one in sets]

    def smaller(self, outcome: Outcome, stored: frozenset[str], names: Sequence[str]) -> list[_Start]:
        """From much stored to a plan that fits; none where nothing is left to drop."""
        while outcome.peak > self.limit:
            others = self._others(stored, [name for name in names if name in stored])
            if not others:
                return []
            outcome, stored = min(others, key=lambda one: (max(one[0].peak, self.limit), one[0].milliseconds))
        return [(outcome, stored)]

    def better(self, outcome: Outcome, stored: frozenset[str], names: Sequence[str]) -> Outcome:
        """A plan that fits with less work, where one is near."""
        while True:
            fitting = [one for one in self._others(stored, names) if one[0].peak <= self.limit]
            best = min(fitting, key=lambda one: one[0].milliseconds, default=None)
            if best is None or best[0].milliseconds >= outcome.milliseconds * (1 - 1e-9):
                return outcome
            outcome, stored = best
