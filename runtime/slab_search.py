"""Which values to store whole when a program runs in slabs: the choice of least work, found by trying, that fits.

Stored values take memory; those that are not stored are made anew in every pass that reads them, and low slabs make
more rows twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

from .slab_schedule import Pass

_SMALL = 1 / 256
"""Of the limit: whether such values are stored is not tried one by one."""


@final
@dataclass(frozen=True)
class Outcome:
    """`peak`: bytes, infinite where no height will do. `milliseconds`: an estimate, for comparison."""

    passes: tuple[Pass, ...]
    peak: float
    milliseconds: float


class Simulation(Protocol):
    """What running in slabs takes, without running."""

    def bytes(self, name: str) -> int:
        """Of a value, stored whole."""
        ...

    def run(self, stored: Collection[str], limit: float) -> Outcome:
        """Every pass as tall as fits in `limit` bytes; where none fits, what takes least."""
        ...


def search(
    simulation: Simulation, forced: frozenset[str], levels: Sequence[str], others: Sequence[str], limit: float
) -> Outcome:
    """The outcome with the least work whose peak is at most `limit`; where there is none, one of the smallest peak.

    `forced` is stored in any case; of `levels` all up to a size are tried together, then each one, as each of `others`.
    """
    starts: list[_Start] = []
    for threshold in [*sorted({simulation.bytes(name) for name in levels}, reverse=True), 0]:
        stored = frozenset(name for name in levels if simulation.bytes(name) <= threshold)
        starts.append((simulation.run(forced | stored, limit), stored))
    fitting = [start for start in starts if start[0].peak <= limit]
    if not fitting:
        return min((start[0] for start in starts), key=lambda one: one.peak)
    large = [name for name in (*levels, *others) if simulation.bytes(name) > limit * _SMALL]
    local = _Search(simulation, forced, limit)
    found = [*fitting[:1], *local.smaller(*starts[0], large)]
    return min((local.better(*start, large) for start in found), key=lambda one: one.milliseconds)


_Start = tuple[Outcome, frozenset[str]]
"""A plan and what it stores."""


@final
@dataclass(frozen=True)
class _Search:
    """Of all ways to store one value more or one less, the best, again and again."""

    simulation: Simulation
    forced: frozenset[str]
    limit: float

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
