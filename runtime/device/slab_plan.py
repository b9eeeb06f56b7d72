"""How to run a program of volumes within a memory limit: which values are stored whole, and how tall slabs are.

The plan is the one of least work that `search` finds, whose peak fits; the peak is a simulation of what the run
allocates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from volcast.runtime.slab_schedule import Pass
from volcast.runtime.slab_search import search

from .cost import Described
from .operations import evaluate
from .program import DeviceProgram
from .slab_pass import Apply
from .slab_program import SlabProgram, take_norms_apart
from .slab_simulation import Simulation


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
    best = search(simulation, frozenset(forced), levels, others, limit_bytes)
    if best.peak > limit_bytes:
        raise ValueError(_too_small(limit_bytes, best.peak, inputs))
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
