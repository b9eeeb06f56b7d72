"""What a worker does, wherever it runs: load the model once, then one volume after another into the parts' folder."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from .artifact import MANIFEST, read_manifest
from .atomic import sha256
from .engine_auto import open_engine
from .job import Job, make_job
from .pipeline import load
from .programs import Programs
from .request import Request, make_request
from .sampling import Watch
from .spec import ArtifactSpec, Manifest
from .volume import Volume, centred_affine

FAULTS = (ValueError, OSError, MemoryError)
"""What another worker would run into as well: the run ends. Anything else is the death of a worker."""


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all volumes of a dataset share; it travels to the workers.

    Attributes:
        artifact: its folder, under the same path wherever a worker runs.
        artifact_sha256: of its manifest, which lists the sha256 of every other file.
        engine: a name of `EngineName` but "auto".
        settings: `Settings`, of a token model `ChoiceSettings`, of a one-pass model none.
        constant: conditions of every sample; `negative`: those of guidance's other branch that are not its own.
        parts: the folder that the workers write to.
    """

    artifact: Path
    artifact_sha256: str
    engine: str
    threads: int
    seed: int
    settings: Any
    constant: Mapping[str, Any]
    negative: Mapping[str, Any]
    parts: Path

    def job(self, spec: ArtifactSpec, request: Request, task: Task) -> Job:
        """What makes the volume of `task`, of a diffusion model."""
        return make_job(spec, request, task.sample + 1, 1, self.condition(task), None, self.negative)

    def condition(self, task: Task) -> dict[str, Any]:
        """All conditions of `task`."""
        return {**self.constant, **task.own}


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """Sample number `sample`, with the conditions that it does not share."""

    sample: int
    own: Mapping[str, Any]


@final
@dataclass(frozen=True, kw_only=True)
class Made:
    """A whole file on the disk, in the parts' folder."""

    task: Task
    part: Path
    sha256: str
    bytes: int
    shape: tuple[int, ...]


@final
class Worker:
    """Cheap to make; `load` opens the model."""

    _spec: Manifest
    _volume: Callable[[Task], Volume]

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def load(self) -> None:
        """Raises ValueError: a missing engine, an artifact that is not the dataset's."""
        recipe = self._recipe
        spec = read_manifest(recipe.artifact)
        if sha256(recipe.artifact / MANIFEST) != recipe.artifact_sha256:
            raise ValueError(
                f"[generate] {recipe.artifact} is another artifact here; copy the same one to every machine"
            )
        self._spec = spec
        engine = open_engine(recipe.engine, recipe.threads)
        if not isinstance(spec, ArtifactSpec):
            model = load(recipe.artifact, engine)
            self._volume = lambda task: model.submit(
                recipe.seed, sample=task.sample, condition=recipe.condition(task), **recipe.settings
            ).result()
            return
        sampler = engine.sampler(recipe.artifact, spec, Programs(recipe.artifact, spec, engine))

        def volume(task: Task) -> Volume:
            job = recipe.job(spec, make_request(spec, recipe.seed, recipe.settings), task)
            part = range(task.sample, task.sample + 1)
            images, report = next(iter(sampler.run(job, [part], None, Watch())))
            affine = centred_affine(images.shape[2:], spec.spacing_mm)
            array = np.ascontiguousarray(images[0, 0] if images.shape[1] == 1 else images[0])
            return Volume(array, affine, spec.spacing_mm, report)

        self._volume = volume

    def make(self, task: Task) -> Made:
        """The volume that `Model.sample_many(seed=recipe.seed)` yields as number `task.sample`.

        Raises:
            ValueError: values that are not finite, no room, the parts' folder is not there.
        """
        return keep(self._recipe, self._spec, task, self._volume(task))


def keep(recipe: Recipe, spec: Manifest, task: Task, volume: Volume) -> Made:
    """Write the volume into the parts' folder. ValueError: no room, the folder is not there."""
    part = recipe.parts / f"{task.sample:08}-{secrets.token_hex(8)}.nii.gz"
    volume.save(part, f"volcast {spec.name} seed {recipe.seed}")
    return Made(
        task=task, part=part, sha256=sha256(part), bytes=part.stat().st_size, shape=volume.array.shape
    )


@final
@dataclass(frozen=True, kw_only=True)
class Ready:
    """The worker has loaded the model."""

    slot: int


@final
@dataclass(frozen=True, kw_only=True)
class Finished:
    slot: int
    made: Made


@final
@dataclass(frozen=True, kw_only=True)
class Failed:
    """One of `FAULTS`."""

    slot: int
    reason: str


@final
@dataclass(frozen=True, kw_only=True)
class Died:
    """The worker is gone, and with it the tasks that it was given and has not finished."""

    slot: int
    reason: str


Event = Ready | Finished | Failed | Died


class Crew(ABC):
    """Workers in numbered slots. A slot holds one worker at most; after `Died` it is free."""

    @abstractmethod
    def hire(self, slot: int) -> None:
        """Start a worker; `Ready` or `Died` follows."""

    @abstractmethod
    def give(self, slot: int, task: Task) -> None:
        """Queue a task; `Finished`, `Failed` or `Died` follows, in the order of the tasks."""

    @abstractmethod
    def events(self, timeout: float | None) -> list[Event]:
        """Wait for what happens next, at most `timeout` seconds (None: for ever)."""

    @abstractmethod
    def close(self) -> None:
        """End every worker at once, and wait for that."""


def fault(error: BaseException) -> str:
    """One line for `Failed`."""
    return " ".join(str(error).split()) or type(error).__name__
