"""A decoder in segments at fixed latent sizes: which rows of its inputs a segment needs, slab by slab.

A row is one position along the first spatial axis: a plane of a volume, a line of an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

from .spec import SlabNorm, SlabRead, SlabSegment, SlabSpec

LATENT, IMAGE = "z", "image"


@final
@dataclass(frozen=True)
class SlabOperation:
    """A segment as an operation of `slab_schedule`."""

    segment: SlabSegment

    @cached_property
    def inputs(self) -> tuple[str | None, ...]:
        return tuple(dict.fromkeys(read.value for read in self.segment.reads))

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.segment.value,)


@final
@dataclass(frozen=True)
class SlabStatistics:
    """What a group norm needs of a value, as a norm of `slab_schedule`."""

    value: str
    groups: int
    epsilon: float

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.value,)

    @property
    def shift(self) -> str | None:
        return None


@final
@dataclass(frozen=True)
class Slabs:
    """One pass, slab by slab. By operation: `counts`, the rows that it makes in every slab; `starts`, the first of them,
    for each slab. `fresh`: the first row of the pass's last operation that no slab before has made."""

    counts: Mapping[int, int]
    starts: tuple[Mapping[int, int], ...]
    fresh: tuple[int, ...]


@final
class SlabProgram:
    """`spec` for one latent with these spatial sizes.

    Attributes:
        inputs, operations, norms, outputs: as `slab_schedule` wants them.
        whole: the operations that run on all rows at once.
    """

    def __init__(self, spec: SlabSpec, sizes: Sequence[int]) -> None:
        self._spec, self._sizes = spec, tuple(sizes)
        self.inputs, self.outputs = (LATENT,), (IMAGE,)
        self.operations = tuple(SlabOperation(segment) for segment in spec.segments)
        self.norms = tuple(dict.fromkeys(statistics(norm) for one in spec.segments for norm in one.norms))
        self.whole = frozenset(i for i, one in enumerate(self.operations) if one.segment.whole)

    def weights(self) -> frozenset[str]:
        """None: a program has its own."""
        return frozenset()

    def shape(self, value: str) -> tuple[int, ...]:
        """`[1, C, rows, ..]` of a whole value."""
        known = self._spec.values[value]
        return (
            1,
            known.channels,
            *(size * scale for size, scale in zip(self._sizes, known.scale, strict=True)),
        )

    def bytes(self, value: str) -> int:
        return 4 * math.prod(self.shape(value))

    def depth(self, value: str) -> int:
        return self.shape(value)[2]

    def scale(self, read: SlabRead, made: str) -> int:
        """How many rows of what a segment makes stand over one row that it reads."""
        return self._spec.values[made].scale[0] // self._spec.values[read.value].scale[0]

    def step(self, index: int) -> int:
        """What the rows of a slab of an operation are a multiple of."""
        segment = self.operations[index].segment
        return math.lcm(*(self.scale(read, segment.value) for read in segment.reads))

    def needed(self, index: int, read: SlabRead, start: int, count: int) -> tuple[int, int]:
        """The rows [first, last) of an input that make the rows from `start` on; they may lie outside the volume."""
        scale = self.scale(read, self.operations[index].segment.value)
        return start // scale - read.before, (start + count) // scale + read.after

    def input_shapes(self, index: int, count: int) -> dict[str, tuple[int, ...]]:
        """The shapes of an operation's program that makes `count` rows."""
        segment = self.operations[index].segment
        found: dict[str, tuple[int, ...]] = {}
        for read in segment.reads:
            first, last = self.needed(index, read, 0, count)
            shape = self.shape(read.value)
            found[read.input] = (*shape[:2], last - first, *shape[3:])
            if read.mask is not None:
                found[read.mask] = (1, 1, last - first, *(1,) * len(shape[3:]))
        for norm in segment.norms:
            shape = self.shape(norm.value)
            found |= dict.fromkeys((norm.mean, norm.inverse), (1, shape[1], *(1,) * len(shape[2:])))
        return found

    def slabs(self, indices: Sequence[int], height: int) -> Slabs:
        """The rows of a pass over `indices`, whose last operation makes `height` rows at once (0: all).

        Every slab of an operation has as many rows, so that one program makes them all: a slab at the volume's end, or
        one that needs fewer rows, makes some that another makes as well.
        """
        target = indices[-1]
        depth = self.depth(self.operations[target].segment.value)
        rows = min(depth, _up(height or depth, self.step(target)))
        fresh = tuple(range(0, depth, rows))
        starts = [{target: min(first, depth - rows)} for first in fresh]
        counts = {target: rows}
        for index in reversed(indices[:-1]):
            spans = [self._span(index, indices, counts, at) for at in starts]
            depth = self.depth(self.operations[index].segment.value)
            counts[index] = max(last - first for first, last in spans)
            for at, (first, _) in zip(starts, spans, strict=True):
                at[index] = min(first, depth - counts[index])
        return Slabs(counts, tuple(starts), fresh)

    def _span(
        self, index: int, indices: Sequence[int], counts: Mapping[int, int], at: Mapping[int, int]
    ) -> tuple[int, int]:
        """The rows [first, last) of an operation that the others of a slab read, as many as its step allows."""
        value = self.operations[index].segment.value
        spans = [
            self.needed(reader, read, at[reader], counts[reader])
            for reader in indices
            if reader in counts
            for read in self.operations[reader].segment.reads
            if read.value == value
        ]
        step = self.step(index)
        first = max(0, min(first for first, _ in spans)) // step * step
        return first, _up(min(self.depth(value), max(last for _, last in spans)), step)


def statistics(norm: SlabNorm) -> SlabStatistics:
    return SlabStatistics(norm.value, norm.groups, norm.epsilon)


def _up(rows: int, step: int) -> int:
    return -(-rows // step) * step
