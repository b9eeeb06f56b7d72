"""The volumes of `fewer_steps`: every scheduler and number of steps in turns, kept in a folder, so that a run resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from volcast.export.calibration import draw_condition
from volcast.runtime.pipeline import Model
from volcast.runtime.sampler import Method
from volcast.runtime.volume import read_nifti

Array = NDArray[np.float32]

TIMES = "times.jsonl"


@final
@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A column of volumes: a scheduler and its number of steps."""

    scheduler: Method
    steps: int

    @property
    def name(self) -> str:
        """Also the folder's."""
        return f"{self.scheduler}-{self.steps}"

    @property
    def stochastic(self) -> bool:
        """Noise joins at every step, not at the first alone."""
        return self.scheduler == "ddpm"


def draw(
    model: Model, samplers: Mapping[Sampler, int], folder: Path, on_volume: Callable[[int, int], object]
) -> None:
    """Draw as many volumes of every sampler as `samplers` says into `folder`, where they do not lie yet.

    Volume i has the seed i and a condition of its own, drawn evenly from the fields' ranges, with every sampler. The
    samplers take turns, so that each has the same share of a machine's slow moments. `on_volume` is told the volumes
    done and to do.
    """
    done, total = 0, sum(samplers.values())
    for seed in range(max(samplers.values())):
        condition = draw_condition(model.spec, {}, np.random.default_rng(seed))
        for sampler in (each for each, volumes in samplers.items() if seed < volumes):
            path = volume_path(folder, sampler, seed)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                volume = model.sample(
                    seed, condition=condition, scheduler=sampler.scheduler, steps=sampler.steps
                )
                assert volume.report is not None
                line = {"name": sampler.name, "seed": seed, "seconds": volume.report.total_seconds}
                with (folder / TIMES).open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(line) + "\n")
                volume.save(path)
            done += 1
            on_volume(done, total)


def volume_path(folder: Path, sampler: Sampler, seed: int) -> Path:
    """Where a volume lies."""
    return folder / sampler.name / f"{seed:04}.nii.gz"


def read_volumes(folder: Path, sampler: Sampler, volumes: int) -> Array:
    """`[volumes, 1, D, H, W]`."""
    return np.stack([read_nifti(volume_path(folder, sampler, seed)).array[None] for seed in range(volumes)])


def seconds(folder: Path, sampler: Sampler, volumes: int) -> list[float]:
    """What each volume took; of one drawn twice, since the run was killed between its line and its file, the last."""
    taken = {}
    for text in (folder / TIMES).read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["name"] == sampler.name:
            taken[line["seed"]] = line["seconds"]
    return [taken[seed] for seed in range(volumes)]
