"""Where the time and the memory of a sample went."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import final

from .programs import Programs


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """One batch, measured. Seconds of wall time; a batch's volumes share their report.

    `open_seconds` is what opening engines took (0 when they were open); the other times do not hold it.
    `network_seconds` is the part of `loop_seconds` inside the step program. `peak_bytes` is the peak of the process's
    resident memory during the batch, or since the process began where that cannot be told (`peak_of_process`).
    `predicted_bytes`: with a memory limit, the peak as it was predicted: the process's, on TensorRT's engines the device's.
    `decode_slabs`: in how many slabs each image was decoded, over all passes; 0: whole. `device_bytes`: what the engine
    reserved on a device of its own: weights, arenas and the sampler's state.
    """

    engine: str
    threads: int
    scheduler: str
    steps: int
    batch: int
    open_seconds: float
    schedule_seconds: float
    prepare_seconds: float
    loop_seconds: float
    network_seconds: float
    decode_seconds: float
    peak_bytes: int
    peak_of_process: bool
    predicted_bytes: int = 0
    decode_slabs: int = 0
    device_bytes: int = 0

    @property
    def total_seconds(self) -> float:
        """All the work but the opening of engines."""
        return self.schedule_seconds + self.prepare_seconds + self.loop_seconds + self.decode_seconds

    @property
    def overhead(self) -> float:
        """The fraction of the total that the loop spends outside the step program."""
        return (self.loop_seconds - self.network_seconds) / self.total_seconds

    def with_decode(self, seconds: float) -> Report:
        """The same with the time of a decode that ended later."""
        return replace(self, decode_seconds=seconds)

    def as_dict(self) -> dict[str, str | int | float | bool]:
        """Every field, the total and the overhead, for JSON."""
        return {**asdict(self), "total_seconds": self.total_seconds, "overhead": self.overhead}


@final
class Stopwatch:
    """Laps of wall time without what opening engines takes meanwhile."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._opened = self._first_opened = programs.open_seconds
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now, opened = time.perf_counter(), self._programs.open_seconds
        seconds = now - self._last - (opened - self._opened)
        self._last, self._opened = now, opened
        return seconds

    def open_seconds(self) -> float:
        """What opening engines took since the start."""
        return self._programs.open_seconds - self._first_opened
