"""What decoding slab by slab allocates and costs for a choice of stored values, without computing anything."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from volcast.runtime.slab_schedule import Pass, heights, schedule
from volcast.runtime.slab_search import Outcome

from .allocations import Allocations
from .cost import Described, program_cost, roofline_ms
from .memory import empty
from .operations import dense
from .slab_pass import Apply, SlabStep, slab_steps
from .slab_program import Norm, SlabProgram
from .slab_trace import Tracer
from .slabs import is_local, local
from .statistics import RowMoments, center_and_scale

MOST_ELEMENTS = 2**31
"""A tensor of a slab has fewer: cuDNN and many of PyTorch's kernels count in 32 bits. Stored values may have more."""


@final
@dataclass(frozen=True)
class _Profile:
    """A pass at one height. `peak`: beyond what was stored before; `kept`: by stored output, its bytes or the value
    in whose memory it lies."""

    peak: float
    milliseconds: float
    kept: Mapping[str, int | str]


@final
class Simulation:
    """Attributes:
    shapes, dtypes: of every value and weight, whole.
    """

    def __init__(
        self, program: SlabProgram, weights: Mapping[str, Tensor], inputs: Described, apply: Apply
    ) -> None:
        self._program, self._operations = program, program.operations
        weights = {name: weights[name].to("meta") for name in program.weights()}
        values = _values(program, weights, inputs, apply)
        known = {**weights, **values}
        self.shapes = {name: tuple(x.shape) for name, x in known.items()}
        self.dtypes = {name: x.dtype for name, x in known.items()}
        self._tracer = Tracer(apply, weights, values)
        described = {name: (tuple(values[name].shape), values[name].dtype) for name in program.whole.inputs}
        costs = program_cost(program.whole, weights, described).operations
        self._costs = {cost.output: cost for cost in costs}
        self._profiles: dict[tuple[tuple[int, ...], int, tuple[str, ...], tuple[str, ...]], _Profile] = {}
        self._whole = {
            i for i, operation in enumerate(self._operations) if not is_local(operation, self.shapes)
        }
        self._weights = set(weights)
        self._constant = {
            *weights,
            *inputs,
            *(name for norm in program.norms for name in (norm.center, norm.scale)),
        }
        self._merges = tuple(_merge_bytes(norm, known) for norm in program.norms)

    def bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def forced(self) -> set[str]:
        """What is stored in every plan: outputs, and what an operation reads or makes whole."""
        found = set(self._program.outputs)
        for index, operation in enumerate(self._operations):
            if index in self._whole:
                found |= {*operation.outputs, *(name for name in operation.inputs if name is not None)}
                continue
            part = local(operation, self.shapes, 0, self.shapes[operation.outputs[0]][2])
            read = zip(part.operation.inputs, part.rows, strict=True)
            found |= {name for name, rows in read if name is not None and rows is None}
        return found - self._constant

    def whole_milliseconds(self) -> float:
        """Every operation once, at an H100's practical peaks."""
        return sum(cost.roofline_ms for cost in self._costs.values())

    def run(self, stored: Collection[str], limit: float) -> Outcome:
        """Every pass as tall as fits in `limit` bytes; where none fits, what takes least."""
        live = float(sum(map(self.bytes, self._constant)))
        peak, milliseconds, passes = live, 0.0, []
        roots: dict[str, str] = {}  # stored value -> the value in whose memory it lies
        sizes: dict[str, int] = {}
        for one in schedule(self._program, self._whole, stored):
            live += sum(map(self._moment_bytes, one.moments))
            one, profile = self._fit(one, limit - live)
            passes.append(one)
            peak, milliseconds = max(peak, live + profile.peak), milliseconds + profile.milliseconds
            for name, place in profile.kept.items():
                roots[name] = roots.get(place, place) if isinstance(place, str) else name
                if isinstance(place, int):
                    sizes[name] = place
                    live += place
            peak = max([peak, *(live + self._merges[norm] for norm in one.merges)])
            live -= sum(map(self._moment_bytes, one.forgets))
            for name in one.frees:
                root = roots.pop(name)
                if root not in roots.values():
                    live -= sizes.pop(root, 0)
        return Outcome(tuple(passes), peak, milliseconds)

    def _fit(self, one: Pass, room: float) -> tuple[Pass, _Profile]:
        least = None
        for height in self._heights(one):
            tried = replace(one, height=height)
            profile = self._profile(tried)
            if profile.peak <= room:
                return tried, profile
            if least is None or profile.peak < least[1].peak:
                least = tried, profile
        assert least is not None
        return least

    def _heights(self, one: Pass) -> list[int]:
        if not one.indices or one.indices[-1] in self._whole:
            return [0]
        return heights(self.shapes[self._operations[one.indices[-1]].outputs[0]][2])

    def _profile(self, one: Pass) -> _Profile:
        key = one.indices, one.height, one.stores, one.moments
        if key not in self._profiles:
            self._profiles[key] = self._measure(one)
        return self._profiles[key]

    def _measure(self, one: Pass) -> _Profile:
        if not one.indices:
            return _Profile(
                max(self._tracer.moments(name, self.shapes[name][2])[0] for name in one.moments), 0.0, {}
            )
        target = one.indices[-1]
        if target in self._whole:
            return self._slab(one, None)
        depth = self.shapes[self._operations[target].outputs[0]][2]
        if not one.height:
            return self._slab(one, (0, depth))
        kept: dict[str, int | str] = {name: self.bytes(name) for name in one.stores}
        written = sum(map(self.bytes, one.stores))
        peak, milliseconds = self._slabs(one, depth)
        return _Profile(written + peak, milliseconds + roofline_ms(0, 2 * written), kept)

    def _slabs(self, one: Pass, depth: int) -> tuple[float, float]:
        """(peak, milliseconds) of all. Those that touch no end are alike after every period, of which one is seen."""
        slabs = [(start, min(start + one.height, depth)) for start in range(0, depth, one.height)]
        low, high = 0, len(slabs)
        while low < high and not self._is_inside(one, slabs[low]):
            low += 1
        while high > low and not self._is_inside(one, slabs[high - 1]):
            high -= 1
        period = self._period(one, depth)
        alike = min(period // math.gcd(period, one.height), high - low)
        ends = [self._slab(one, slab) for slab in (*slabs[:low], *slabs[high:])]
        inside = [self._slab(one, slab) for slab in slabs[low : low + alike]]
        milliseconds = sum(slab.milliseconds for slab in ends)
        if inside:
            milliseconds += sum(slab.milliseconds for slab in inside) * (high - low) / alike
        return max(slab.peak for slab in (*ends, *inside)), milliseconds

    def _is_inside(self, one: Pass, slab: tuple[int, int]) -> bool:
        return slab[1] - slab[0] == one.height and all(
            rows is None or (rows[0] > 0 and rows[1] < self.shapes[name or ""][2])
            for step in slab_steps(self._operations, one.indices, self.shapes, slab)
            for name, rows in zip(step.local.operation.inputs, step.local.rows, strict=True)
        )

    def _period(self, one: Pass, depth: int) -> int:
        """After so many rows of the target, a slab reads rows that lie as before, of every value."""
        names = {name for index in one.indices for name in self._operations[index].inputs if name is not None}
        depths = {self.shapes[name][2] for name in names - self._weights if len(self.shapes[name]) >= 4}
        return math.lcm(*(depth // math.gcd(depth, other) for other in depths))

    def _slab(self, one: Pass, rows: tuple[int, int] | None) -> _Profile:
        """`kept`: what lies in the slab's own memory."""
        live, peak, milliseconds, largest = 0, 0, 0.0, 0
        place: dict[str, str] = {}  # value of the slab -> the value in whose memory it lies
        sizes: dict[str, int] = {}
        lengths: dict[str, int] = {}
        for step in slab_steps(self._operations, one.indices, self.shapes, rows):
            traced = self._tracer.step(step, lengths)
            peak, largest = max(peak, live + traced.peak), max(largest, traced.largest)
            milliseconds += self._milliseconds(step)
            for name, where in zip(self._operations[step.index].outputs, traced.outputs, strict=True):
                place[name] = place.get(where, where) if isinstance(where, str) else name
                if isinstance(where, int):
                    sizes[name] = where
                    live += where
                if step.rows is not None:
                    lengths[name] = step.rows[1] - step.rows[0]
            for name in step.release:
                root = place.pop(name)
                if root not in place.values():
                    live -= sizes.pop(root, 0)
        for name in one.moments:
            extra, elements = self._tracer.moments(name, lengths.get(name, self.shapes[name][2]))
            peak, largest = max(peak, live + extra), max(largest, elements)
            milliseconds += roofline_ms(
                0, self.bytes(name) * lengths.get(name, self.shapes[name][2]) // self.shapes[name][2]
            )
        kept = {name: sizes.get(place[name], place[name]) for name in one.stores}
        return _Profile(math.inf if largest >= MOST_ELEMENTS else peak, milliseconds, kept)

    def _milliseconds(self, step: SlabStep) -> float:
        """The step's share in the whole operation: of its products by rows made, of its bytes by rows moved."""
        operation = self._operations[step.index]
        cost = self._costs.get(operation.outputs[0])
        if cost is None:
            return 0.0
        if step.rows is None:
            return cost.roofline_ms
        count = step.rows[1] - step.rows[0]
        made = (count + step.local.first) / self.shapes[operation.outputs[0]][2]
        read = [(rows[1] - rows[0]) / self.shapes[name or ""][2]
                for name, rows in zip(step.local.operation.inputs, step.local.rows, strict=True) if rows]  # fmt: skip
        return roofline_ms(int(cost.flops * made), int(cost.bytes * max([made, *read])))

    def _moment_bytes(self, name: str) -> int:
        return 16 * math.prod(self.shapes[name][:3])


def _values(
    program: SlabProgram, weights: Mapping[str, Tensor], inputs: Described, apply: Apply
) -> dict[str, Tensor]:
    """Every value, whole, on `meta`."""
    missing = [name for name in program.inputs if name not in inputs]
    if missing:
        raise ValueError(f"[decode] {missing[0]} is missing: need every input's shape")
    values = {name: empty(inputs[name], "meta") for name in program.inputs}
    norms = {name for norm in program.norms for name in (norm.center, norm.scale)}
    for operation in program.operations:
        for name in norms.intersection(operation.inputs):
            values[name] = torch.empty(values[operation.inputs[0] or ""].shape[:2], device="meta")
        given = [None if name is None else values[name] if name in values else weights[name]
                 for name in operation.inputs]  # fmt: skip
        values |= zip(operation.outputs, map(dense, apply(operation, given)), strict=True)
    return values


def _merge_bytes(norm: Norm, known: Mapping[str, Tensor]) -> int:
    """What merging the statistics takes for a moment, without its results."""
    moments = [RowMoments(known[part].shape, torch.device("meta")) for part in norm.parts]
    shift = None if norm.shift is None else known[norm.shift]
    with Allocations() as allocations:
        results = center_and_scale(moments, shift, norm.groups, known[norm.weight], norm.eps)
    return int(allocations.peak - 4 * sum(result.numel() for result in results))
