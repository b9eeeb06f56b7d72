"""volcast: an artifact on one of its engines."""

from __future__ import annotations

from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from volcast.runtime.pipeline import load
from volcast.runtime.volume import Volume

from .contestant import Clock, Contestant, Task


@final
class VolcastContestant(Contestant):
    """`volcast.load(...).sample(...)` with MONAI 1.6.1's timesteps and numbers, so that all compute the same."""

    def __init__(self, task: Task, *, engine: str = "auto") -> None:
        self._task = task
        self._model = load(task.artifact, engine, task.threads)

    def volume(self, clock: Clock) -> NDArray[np.float32]:
        task = self._task
        volume = self._model.sample(
            task.seed, condition=task.conditions, steps=task.steps, scheduler="ddim", compat="monai-1.6"
        )
        return _measured(volume, clock)


class Unavailable(Exception):
    """The engine cannot run the artifact here: a row of the table, not the end of the race."""


@final
class EngineContestant(Contestant):
    """One engine on one artifact, with the model's own scheduler."""

    def __init__(self, task: Task, *, engine: str, artifact: str) -> None:
        self._task = task
        try:
            self._model = load(Path(artifact), engine, task.threads)
        except ValueError as error:
            raise Unavailable(str(error)) from error

    def volume(self, clock: Clock) -> NDArray[np.float32]:
        task = self._task
        try:
            volume = self._model.sample(task.seed, condition=task.conditions, steps=task.steps)
        except ValueError as error:
            raise Unavailable(str(error)) from error
        return _measured(volume, clock)


def _measured(volume: Volume, clock: Clock) -> NDArray[np.float32]:
    """The volume `[C, D, H, W]`; its report goes to `clock`."""
    report = volume.report
    assert report is not None
    clock.seconds["prepare"] += report.schedule_seconds + report.prepare_seconds
    clock.seconds["network"] += report.network_seconds
    clock.seconds["decode"] += report.decode_seconds
    clock.device_bytes = report.device_bytes
    array = np.asarray(volume.array, np.float32)
    return array if array.ndim > len(volume.spacing_mm) else array[None]
