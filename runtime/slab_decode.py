"""Decodes a latent slab by slab, with the statistics of the whole volume: exact, in little memory, by any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from .engine import Program
from .memory import give_back
from .moments import merged
from .programs import bind
from .slab_schedule import Pass
from .slabs import IMAGE, LATENT, SlabProgram, Slabs, SlabStatistics, statistics
from .spec import ProgramSpec, SlabRead

Array = NDArray[np.float32]
Open = Callable[[ProgramSpec, Mapping[str, int]], Program]
"""Opens a segment's program at these sizes."""
Source = tuple[Array, int]
"""Rows of a value, `[1, C, rows, ..]`, and the row with which they begin."""


def decode_slabs(program: SlabProgram, passes: Iterable[Pass], opener: Open, latent: Array) -> Array:
    """The image `[1, C, D, H, W]` of one latent `[1, C, D', H', W']`; `passes` as a search found them.

    Programs are opened for a pass and closed after it, so that no more weights than its own lie in memory.
    """
    run = _Run(program, opener, latent)
    for one in passes:
        run.make(one)
        give_back()
    return run.values[IMAGE]


@final
class _Run:
    """What is stored, and the statistics that are known."""

    def __init__(self, program: SlabProgram, opener: Open, latent: Array) -> None:
        self._program, self._opener = program, opener
        self.values: dict[str, Array] = {LATENT: latent}
        self._moments: dict[str, NDArray[np.float32]] = {}  # [2, C, rows]: means, variances
        self._known: dict[SlabStatistics, tuple[Array, Array]] = {}

    def make(self, one: Pass) -> None:
        slabs = self._program.slabs(one.indices, one.height)
        opened = {index: self._open(index, count) for index, count in slabs.counts.items()}
        value = self._program.operations[one.indices[-1]].segment.value
        depth = self._program.depth(value)
        taken = overwritten(self._program, one)
        if taken is not None:
            self.values[value] = self.values[taken]
        elif one.stores:
            self.values[value] = np.empty(self._program.shape(value), np.float32)
        for name in one.moments:
            self._moments[name] = np.empty((2, *self._program.shape(name)[1:3]), np.float32)
        for at, fresh in zip(slabs.starts, slabs.fresh, strict=True):
            made = self._slab(one.indices, slabs, at, opened)
            new = slice(fresh - at[one.indices[-1]], None)
            to = slice(fresh, min(fresh + slabs.counts[one.indices[-1]], depth))
            if one.stores:
                self.values[value][:, :, to] = made["y"][:, :, new]
            if one.moments:
                for place, name in enumerate(("mean", "variance")):
                    self._moments[value][place, :, to] = made[name].reshape(made[name].shape[1:3])[:, new]
            del made  # before the next slab is made
        for index in one.merges:
            norm = self._program.norms[index]
            self._known[norm] = self._merged(norm)
        for name in one.forgets:
            del self._moments[name]
        for name in one.frees:
            del self.values[name]

    def _open(self, index: int, count: int) -> Program:
        described = self._program.operations[index].segment.program
        sizes = bind("decode", described, self._program.input_shapes(index, count))
        return self._opener(described, sizes)

    def _slab(
        self, indices: Sequence[int], slabs: Slabs, at: Mapping[int, int], opened: Mapping[int, Program]
    ) -> dict[str, Array]:
        """What the last operation's program gives."""
        made: dict[str, Source] = {}
        last = {name: index for index in indices for name in self._program.operations[index].inputs}
        for index in indices:
            segment = self._program.operations[index].segment
            inputs: dict[str, NDArray[np.generic]] = {}
            for read in segment.reads:
                inputs |= self._rows(index, read, made, at[index], slabs.counts[index])
            for norm in segment.norms:
                inputs[norm.mean], inputs[norm.inverse] = self._known[statistics(norm)]
            for name in [name for name in made if last[name] == index]:
                del made[name]  # its rows were copied
            results = opened[index](inputs)
            del inputs
            if index != indices[-1]:
                made[segment.value] = np.asarray(results["y"], np.float32), at[index]
        return {name: np.asarray(result, np.float32) for name, result in results.items()}

    def _rows(
        self, index: int, read: SlabRead, made: Mapping[str, Source], start: int, count: int
    ) -> dict[str, Array]:
        """The rows of one input, and its mask."""
        x, begins = made[read.value] if read.value in made else (self.values[read.value], 0)
        depth = self._program.depth(read.value)
        first, last = self._program.needed(index, read, start, count)
        low, high = max(first, 0), min(last, depth)
        if (first, last) == (begins, begins + x.shape[2]):
            rows = x
        else:
            rows = np.empty((*x.shape[:2], last - first, *x.shape[3:]), np.float32)
            rows[:, :, low - first : high - first] = x[:, :, low - begins : high - begins]
            rows[:, :, : low - first] = x[:, :, :1] if read.edge else 0
            rows[:, :, high - first :] = x[:, :, -1:] if read.edge else 0
        found = {read.input: rows}
        if read.mask is not None:
            mask = np.zeros((1, 1, last - first, *(1,) * (x.ndim - 3)), np.float32)
            mask[:, :, low - first : high - first] = 1
            found[read.mask] = mask
        return found

    def _merged(self, norm: SlabStatistics) -> tuple[Array, Array]:
        """Every channel's mean and 1 / sqrt(variance + epsilon)."""
        means, variances = self._moments[norm.value].astype(np.float64)[:, None]
        mean, variance = merged(means, variances, norm.groups)
        shape = (1, -1, *(1,) * (len(self._program.shape(norm.value)) - 2))
        each = means.shape[1] // norm.groups
        mean, inverse = (
            np.repeat(x[0], each).reshape(shape) for x in (mean, 1 / np.sqrt(variance + norm.epsilon))
        )
        return mean.astype(np.float32), inverse.astype(np.float32)


def overwritten(program: SlabProgram, one: Pass) -> str | None:
    """A stored value that ends with the pass and whose rows become those of what it stores, each read just before."""
    target = program.operations[one.indices[-1]].segment
    for name in one.frees if one.stores else ():
        reads = [
            read
            for index in one.indices
            for read in program.operations[index].segment.reads
            if read.value == name
        ]
        own = len(reads) == 1 and reads[0] in target.reads and not reads[0].before and not reads[0].after
        if own and not target.whole and program.shape(name) == program.shape(target.value):
            return name
    return None
