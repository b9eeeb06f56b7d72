"""The race: every contestant samples the same volume, in turns within each round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from .bench import Statistics, paired_ratios, summarize
from .contestant import Round, Task, relative_error
from .worker import Entry, Failed, Worker

REFERENCE = "MONAI eager"
"""Every volume is compared with this contestant's."""


@final
@dataclass(frozen=True, kw_only=True)
class Result:
    """One contestant. `reason` says why it has no rounds; `error` is the relative L2 distance of its volume from the
    reference's (None without one); `ratio` is its time for a volume over volcast's, round by round; `cold_s` are the
    seconds from the start of its process to its first volume."""

    name: str
    reason: str | None = None
    error: float | None = None
    rounds: tuple[Round, ...] = ()
    ratio: Statistics | None = None
    cold_s: float | None = None

    def figures(self, steps: int) -> dict[str, Statistics]:
        """`Round.figures` over the rounds."""
        each = [round_.figures(steps) for round_ in self.rounds]
        return {name: summarize([figures[name] for figures in each]) for name in each[0]} if each else {}

    def as_dict(self, steps: int) -> dict[str, Any]:
        """For JSON; `volume_s_rounds` are the times that `ratio` was made from, in the order of the rounds."""
        return {
            "name": self.name,
            "reason": self.reason,
            "relative_l2": self.error,
            "over_volcast": self.ratio.as_dict() if self.ratio else None,
            "cold_s": self.cold_s,
            "volume_s_rounds": [round_.total_s for round_ in self.rounds],
            **{name: statistics.as_dict() for name, statistics in self.figures(steps).items()},
        }


def race(
    entries: Sequence[Entry],
    task: Task,
    *,
    exports: Mapping[str, Entry],
    repeats: int,
    limit_s: float,
    reference: str = REFERENCE,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Result]:
    """Make the `exports`, open all, let each sample once (warm-up and the volume to compare), then `repeats` rounds of turns.

    Who goes first moves on by one a round. The first entry whose name begins with "volcast" is what `ratio` refers
    to, and `reference` names the one whose volume the others' are compared with. `limit_s` bounds each export, opening and the first volume of each: torch.compile works there. A contestant that cannot
    run, or dies, gets a reason instead of figures. `progress` is told what begins, `stages(...)` times at most.

    Raises:
        ValueError: bad input, such as a bundle that cannot be read.
    """
    reasons: dict[str, str] = {}
    volumes: dict[str, NDArray[np.float32]] = {}
    rounds: dict[str, list[Round]] = {entry.name: [] for entry in entries}
    cold: dict[str, float] = {}
    for name, export in exports.items():
        progress(export.name)
        try:
            with Worker(export, task) as worker:
                worker.open(limit_s)
        except Failed as failure:
            reasons[name] = f"{export.name}: {failure}"
    with ExitStack() as stack:
        workers: list[Worker] = []
        for entry in entries:
            if entry.name in reasons:
                continue
            progress(f"{entry.name}: open and warm up")
            began = time.perf_counter()
            worker = stack.enter_context(Worker(entry, task))
            try:
                worker.open(limit_s)
                _, volumes[entry.name] = worker.volume(limit_s)
                cold[entry.name] = time.perf_counter() - began
                workers.append(worker)
            except Failed as failure:
                reasons[entry.name] = str(failure)
                worker.__exit__()
        for turn in range(repeats):
            for position in range(len(workers)):
                worker = workers[(turn + position) % len(workers)]
                progress(f"{worker.name}: round {turn + 1}")
                if worker.name in reasons:
                    continue
                try:
                    rounds[worker.name].append(worker.volume()[0])
                except Failed as failure:
                    reasons[worker.name] = str(failure)
    return _results([entry.name for entry in entries], reasons, volumes, rounds, cold, reference)


def stages(entries: Sequence[Entry], exports: Mapping[str, Entry], repeats: int) -> int:
    """How often `race` calls `progress` if everybody runs."""
    return len(exports) + len(entries) * (1 + repeats)


def _results(
    names: Sequence[str],
    reasons: Mapping[str, str],
    volumes: Mapping[str, NDArray[np.float32]],
    rounds: Mapping[str, Sequence[Round]],
    cold: Mapping[str, float],
    reference: str,
) -> list[Result]:
    wanted = volumes.get(reference)
    base = next((name for name in names if name.startswith("volcast") and name not in reasons), None)
    results = []
    for name in names:
        if name in reasons:
            results.append(Result(name=name, reason=reasons[name]))
            continue
        times = [round_.total_s for round_ in rounds[name]]
        results.append(
            Result(
                name=name,
                error=None if wanted is None else relative_error(volumes[name], wanted),
                cold_s=cold[name],
                rounds=tuple(rounds[name]),
                ratio=None
                if base is None
                else paired_ratios(times, [round_.total_s for round_ in rounds[base]]),
            )
        )
    return results
