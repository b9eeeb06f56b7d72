"""What a step of a slab allocates, found by running it on `meta`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from .allocations import Allocations
from .memory import empty
from .slab_pass import Apply, SlabStep, Source, compute
from .statistics import RowMoments, rows_at_once


@final
@dataclass(frozen=True)
class Traced:
    """What one step allocates: `peak` while it runs; its outputs lie in new memory of so many bytes, or in that of an
    input. `largest`: elements of its largest tensor."""

    peak: int
    outputs: tuple[int | str, ...]
    largest: int


@final
class Tracer:
    """Runs steps on `meta`; equal ones once."""

    def __init__(self, apply: Apply, weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """`weights` and every value, whole, on `meta`."""
        self._apply, self._weights, self._values = apply, weights, values
        self._steps: dict[Any, Traced] = {}
        self._moments: dict[tuple[str, int], tuple[int, int]] = {}

    def step(self, step: SlabStep, lengths: Mapping[str, int]) -> Traced:
        """`lengths`: how many rows there are of the values that are not whole."""
        local = step.local
        key = (
            step.index, str(local.operation.settings), step.rows and step.rows[1] - step.rows[0], local.first,
            tuple(lengths.get(name or "") for name in local.operation.inputs),
            tuple(rows and rows[1] - rows[0] for rows in local.rows),
        )  # fmt: skip
        if key not in self._steps:
            self._steps[key] = self._trace(step, lengths)
        return self._steps[key]

    def moments(self, name: str, rows: int) -> tuple[int, int]:
        """(bytes that statistics of so many rows take for a moment, elements of the largest tensor)."""
        rows = min(rows, rows_at_once(self._values[name].shape))  # the others follow in its memory
        if (name, rows) not in self._moments:
            x = self.like(name, rows)
            moments = RowMoments(x.shape, x.device)
            with Allocations() as allocations:
                moments.add(x, 0)
            self._moments[name, rows] = allocations.peak, allocations.largest
        return self._moments[name, rows]

    def like(self, name: str, rows: int) -> Tensor:
        whole = self._values[name]
        return empty(((*whole.shape[:2], rows, *whole.shape[3:]), whole.dtype), "meta")

    def _trace(self, step: SlabStep, lengths: Mapping[str, int]) -> Traced:
        operation = step.local.operation
        sources: list[Source | None] = []
        for name, rows in zip(operation.inputs, step.local.rows, strict=True):
            if name is None:
                sources.append(None)
                continue
            if name in self._weights:
                sources.append((self._weights[name], 0))
                continue
            x = self.like(name, lengths[name]) if name in lengths else self._values[name]
            sources.append((x, 0 if rows is None else rows[0]))
        where = {source[0].untyped_storage()._cdata: name
                 for source, name in zip(sources, operation.inputs, strict=True) if source and name}  # fmt: skip
        if operation.kind == "resize":
            # Every mode takes the same memory, and on `meta` the nearest is a hundred times as fast.
            quick = operation.model_copy(update={"settings": {**operation.settings, "mode": "nearest"}})
            step = replace(step, local=replace(step.local, operation=quick))
        with Allocations() as allocations:
            outputs = compute(self._apply, step, sources)
        places = tuple(where.get(x.untyped_storage()._cdata) or x.untyped_storage().nbytes() for x in outputs)
        return Traced(allocations.peak, places, allocations.largest)
