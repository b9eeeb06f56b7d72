"""The batch sizes at which a step program may be called: those that give a sample the same bits, and gain."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from .classifier import open_step
from .programs import Programs

Array = NDArray[np.generic]
Lane = tuple[Array, Array, list[Array], Callable[[], Array]]
"""What `_core.Batcher.add_group` takes: x, row, the further inputs, and the call that reads them."""

COUNTS = (1, 2, 4, 8)
GAIN = 0.97
"""A larger batch has to take at most this part of the time a sample of the best smaller one."""
ROUNDS = 3


@final
@dataclass(frozen=True, kw_only=True)
class LaneReport:
    """One batch size: seconds a sample, whether a sample's bits are those of batch 1, and whether it is used."""

    count: int
    sample_s: float
    same_bits: bool
    used: bool


def open_lanes(
    programs: Programs,
    x: tuple[int, ...],
    row: int,
    inputs: Mapping[str, Array],
    counts: Sequence[int] = COUNTS,
) -> tuple[list[Lane], list[LaneReport]]:
    """Open `step` at each of `counts` and keep those that are worth it; the first is 1.

    Args:
        x: a latent's `(C, *spatial)`.
        row: numbers in a row of the schedule.
        inputs: the step program's further inputs of one sample, `[1, ...]` each.

    A larger batch is dropped where a sample's bits differ from those at batch 1, where it is slower a sample, or where
    the engine refuses it.
    """
    lanes: dict[int, Lane] = {}
    same: dict[int, bool] = {}
    rng = np.random.default_rng(0)
    values = {"x": rng.standard_normal((max(counts), *x), np.float32)}
    values["row"] = 0.1 * rng.standard_normal((max(counts), row), np.float32)
    expected = np.empty(0)
    for count in sorted({1, *counts}):
        try:
            lane = _lane(programs, count, x, row, inputs)
        except ValueError:
            if count == 1:
                raise
            break  # past the artifact's axis, or past the memory: larger ones fail too
        lane[0][:], lane[1][:] = values["x"][:count], values["row"][:count]
        for into, value in zip(lane[2], inputs.values(), strict=True):
            into[:] = value
        out = np.array(lane[3]())
        if count == 1:
            expected = np.concatenate([out, *(_alone(lane, values, n) for n in range(1, max(counts)))])
        lanes[count], same[count] = lane, bool((out == expected[:count]).all())
    seconds = _seconds(lanes)
    best, reports = 1, []
    for count in lanes:
        gains = float(np.median(seconds[count] / seconds[best])) <= GAIN
        used = count == 1 or (same[count] and gains)
        best = count if used else best
        reports.append(
            LaneReport(
                count=count, sample_s=float(np.median(seconds[count])), same_bits=same[count], used=used
            )
        )
    return [lanes[report.count] for report in reports if report.used], reports


def _seconds(lanes: Mapping[int, Lane]) -> dict[int, NDArray[np.float64]]:
    """Seconds a sample in each of `ROUNDS`. A round has as many samples at batch 1 as in the largest call: on a busy machine
    a call alone is disturbed the less the shorter it is."""
    found: dict[int, list[float]] = {count: [] for count in lanes}
    for _ in range(ROUNDS):
        for count, lane in lanes.items():
            calls = max(lanes) if count == 1 else 1
            began = time.perf_counter()
            for _ in range(calls):
                lane[3]()
            found[count].append((time.perf_counter() - began) / (calls * count))
    return {count: np.array(taken) for count, taken in found.items()}


def _lane(programs: Programs, count: int, x: tuple[int, ...], row: int, inputs: Mapping[str, Array]) -> Lane:
    given: dict[str, Array] = {
        "x": np.zeros((count, *x), np.float32),
        "row": np.zeros((count, row), np.float32),
        **{name: np.zeros((count, *value.shape[1:]), value.dtype) for name, value in inputs.items()},
    }
    program = open_step(programs, {name: value.shape for name, value in given.items()})

    def call() -> Array:
        return np.ascontiguousarray(program(given)["out"], np.float32)

    return given["x"], given["row"], [given[name] for name in inputs], call


def _alone(lane: Lane, values: Mapping[str, Array], n: int) -> Array:
    lane[0][:], lane[1][:] = values["x"][n], values["row"][n]
    return np.array(lane[3]())
