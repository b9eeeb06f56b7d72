"""volcast: the artifact on one of its engines."""

from __future__ import annotations

from typing import final

import numpy as np
from numpy.typing import NDArray

from volcast.runtime.pipeline import load

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
        report = volume.report
        assert report is not None
        clock.seconds["prepare"] += report.schedule_seconds + report.prepare_seconds
        clock.seconds["network"] += report.network_seconds
        clock.seconds["decode"] += report.decode_seconds
        array = np.asarray(volume.array, np.float32)
        return array if array.ndim == task.noise.ndim - 1 else array[None]
