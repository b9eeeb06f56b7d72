"""The batch sizes at which a step program may be called: those that give a sample the same bits, and gain."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from .programs import Programs

Array = NDArray[np.generic]
Lane = tuple[Array, Array, list[Array], Callable[[], Array]]
"""What `_core.Batcher.add_group` takes: x, row, the further inputs, and the call that reads them."""

COUNTS = (1, 2, 4, 8)
GAIN = 0.97
"""A larger batch has to take at most this part of the time a sample of the best smaller one."""


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
    lanes, reports = [], []
    rng = np.random.default_rng(0)
    values = {"x": rng.standard_normal((max(counts), *x), np.float32)}
    values["row"] = 0.1 * rng.standard_normal((max(counts), row), np.float32)
    best = float("inf")
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
        seconds = min(_timed(lane[3]) for _ in range(3)) / count
        if count == 1:
            expected = np.concatenate([out, *(_alone(lane, values, n) for n in range(1, max(counts)))])
        same = bool((out == expected[:count]).all())
        used = count == 1 or (same and seconds <= GAIN * best)
        if used:
            lanes.append(lane)
            best = seconds
        reports.append(LaneReport(count=count, sample_s=seconds, same_bits=same, used=used))
    return lanes, reports


def _lane(programs: Programs, count: int, x: tuple[int, ...], row: int, inputs: Mapping[str, Array]) -> Lane:
    given: dict[str, Array] = {
        "x": np.zeros((count, *x), np.float32),
        "row": np.zeros((count, row), np.float32),
        **{name: np.zeros((count, *value.shape[1:]), value.dtype) for name, value in inputs.items()},
    }
    program = programs.open("step", {name: value.shape for name, value in given.items()})

    def call() -> Array:
        return np.ascontiguousarray(program(given)["out"], np.float32)

    return given["x"], given["row"], [given[name] for name in inputs], call


def _alone(lane: Lane, values: Mapping[str, Array], n: int) -> Array:
    lane[0][:], lane[1][:] = values["x"][n], values["row"][n]
    return np.array(lane[3]())


def _timed(call: Callable[[], Array]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
