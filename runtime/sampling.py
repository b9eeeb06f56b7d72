"""Running a job: batch by batch, from noise to images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from .autoencoder import Given, decode, decode_plan, decoder_conditions
from .classifier import guided_rows, open_step, with_label
from .denoiser import Denoiser, SweptDenoiser, step_inputs
from .engine import Engine
from .inpaint import Known
from .job import Job
from .ledger import Ledger
from .memory import PeakMemory
from .memory_limit import job_sizes
from .programs import Programs
from .report import Report, Stopwatch
from .reuse import ReusingDenoiser
from .sampler import noised
from .spec import ArtifactSpec

Array = NDArray[np.generic]
Images = NDArray[np.float32]
Branches = Mapping[_core.Branch, Mapping[str, Array]]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Who is told of what while a job runs; what a callback raises stops the run.

    Attributes:
        on_step: called after each step with the steps done and to do, over all batches.
        on_preview: called with the steps done of a batch and its images `[N, C, D, H, W]` as they are after that step.
        preview_every: steps between previews; 0: none.
    """

    on_step: Callable[[int, int], None] | None = None
    on_preview: Callable[[int, Images], None] | None = None
    preview_every: int = 0

    def of_batch(self, number: int, batches: int, steps: int) -> Callable[[int, int], None] | None:
        """`on_step` as one batch of the job calls it."""
        on_step = self.on_step
        return None if on_step is None else lambda done, _: on_step(number * steps + done, batches * steps)


class Sampler(ABC):
    """Runs jobs of one artifact. Not for two threads at once.

    Attributes:
        inpaints: whether it runs plans that inpaint.
    """

    inpaints: ClassVar[bool] = True

    mixes_weights = False
    """Whether the volumes of one batch may have guidance weights of their own."""

    reuses = False
    """Whether it runs requests that reuse features."""

    @abstractmethod
    def run(
        self, job: Job, parts: Sequence[range], x0: NDArray[np.float32] | None, watch: Watch
    ) -> Iterator[tuple[Images, Report]]:
        """For each batch the images `[N, C, D, H, W]` of the samples in its range, and what they cost.

        `x0` `[C, D', H', W']` is a latent to start from instead of pure noise.
        """


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the loop of one batch begins with.

    Attributes:
        x: float32 `[N, C, D, H, W]`, the first latent; becomes the last one.
        rows: float32 `[steps, R]`, what the network is shown of each row of the plan.
        branches: the network's further inputs `[N, ...]`, of both branches with guidance.
    """

    plan: _core.Plan
    x: NDArray[np.float32]
    rows: NDArray[np.float32]
    branches: Branches
    seeds: NDArray[np.uint64]
    samples: NDArray[np.uint64]
    guidance: float | tuple[float, ...] | None
    """One weight for all, or one each."""
    known: Known | None = None
    reuse: int = 1


class Loop(ABC):
    """Carries out a plan on one batch."""

    @abstractmethod
    def run(self, start: Start, after: Callable[[int, int], None], shows: bool) -> float:
        """Every row of the plan; the seconds within the network. `start.x` becomes the result.

        `after(done, steps)` follows each row, and what it raises ends the loop; it may read `start.x` if `shows`.
        """


@final
class HostLoop(Loop):
    """On the host, in C++, with a network that an engine runs."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def run(self, start: Start, after: Callable[[int, int], None], shows: bool) -> float:
        known = start.known
        # Two calls a step with guidance: a doubled batch would open every program at another shape.
        denoiser = self._denoiser(start)
        guidance = start.guidance
        network, weight = (
            (SweptDenoiser(denoiser, guidance), None) if isinstance(guidance, tuple) else (denoiser, guidance)
        )
        return _core.run(
            start.plan, start.x, network, start.seeds, start.samples, guidance=weight, on_step=after,
            known=None if known is None else known.x0, keep=None if known is None else known.keep,
        ).network_s  # fmt: skip

    def _denoiser(self, start: Start) -> Denoiser | ReusingDenoiser:
        if start.reuse > 1:
            return ReusingDenoiser(self._programs, start.x, start.rows, start.branches, start.reuse)
        shapes = {name: value.shape for name, value in start.branches[_core.Branch.CONDITIONAL].items()}
        row = (len(start.x), *start.rows.shape[1:])
        step = open_step(self._programs, {"x": start.x.shape, "row": row, **shapes})
        return Denoiser(step, start.rows, start.branches)


@final
class HostSampler(Sampler):
    """Batch by batch, with programs that an engine runs. `loop`: left out, the one on the host. `ledger`: of a device."""

    def __init__(
        self,
        spec: ArtifactSpec,
        engine: Engine,
        programs: Programs,
        loop: Loop | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._spec = spec
        self._engine = engine
        self._programs = programs
        self._loop = HostLoop(programs) if loop is None else loop
        self.mixes_weights = self.reuses = loop is None
        self._ledger = ledger

    def run(
        self, job: Job, parts: Sequence[range], x0: NDArray[np.float32] | None, watch: Watch
    ) -> Iterator[tuple[Images, Report]]:
        prepared_once: dict[int, Branches] = {}
        for number, part in enumerate(parts):
            on_step = watch.of_batch(number, len(parts), len(job.plan))
            yield self._batch(job, part, x0, watch, on_step, prepared_once)

    def _batch(
        self,
        job: Job,
        part: range,
        x0: NDArray[np.float32] | None,
        watch: Watch,
        on_step: Callable[[int, int], None] | None,
        kept: dict[int, Branches],
    ) -> tuple[Images, Report]:
        """`kept`: the constants of the batch before, by its size, for a job whose volumes share their conditions."""
        programs, spec = self._programs, self._spec
        limited = programs.memory
        predicted = 0 if limited is None else limited.check(job_sizes(spec, job, len(part)))
        memory = PeakMemory()
        if self._ledger is not None:
            self._ledger.restart()
        time = Stopwatch(programs)
        rows = schedule_rows(spec, programs, job)
        schedule_seconds = time.lap()
        branches = kept.get(len(part)) or prepared_branches(spec, programs, job, part)
        kept.clear()
        if job.alike:
            kept[len(part)] = branches
        prepare_seconds = time.lap()

        seeds, samples, x = first_latent(job, part, x0)
        shows = watch.on_preview is not None and watch.preview_every > 0
        given = decoder_conditions(spec, job, part)

        def after(done: int, total: int) -> None:
            if on_step is not None:
                on_step(done, total)
            if watch.on_preview is not None and shows and done % watch.preview_every == 0:
                watch.on_preview(done, self._images(job, x, given))

        start = Start(
            plan=job.plan, x=x, rows=rows, branches=branches, seeds=seeds, samples=samples,
            guidance=job.guidance(part), known=job.known, reuse=job.request.reuse,
        )  # fmt: skip
        network_seconds = self._loop.run(start, after, shows)
        loop_seconds = time.lap()

        images = self._images(job, x, given)
        decode_seconds = time.lap()
        slabs = (
            0
            if limited is None or "decode" not in spec.programs
            else decode_plan(programs, limited, x.shape, given).slabs
        )
        return images, Report(
            engine=self._engine.name,
            threads=self._engine.threads,
            scheduler=job.scheduler,
            steps=len(job.plan),
            batch=len(part),
            open_seconds=time.open_seconds(),
            schedule_seconds=schedule_seconds,
            prepare_seconds=prepare_seconds,
            loop_seconds=loop_seconds,
            network_seconds=network_seconds,
            decode_seconds=decode_seconds,
            peak_bytes=memory.bytes(),
            peak_of_process=memory.since_start_of_process,
            predicted_bytes=predicted,
            decode_slabs=slabs,
            device_bytes=0 if self._ledger is None else self._ledger.peak,
        )

    def _images(self, job: Job, x: NDArray[np.float32], given: Given) -> Images:
        images = decode(self._spec, self._programs, x, given)
        return images if job.known is None else job.known.pasted(images)


def schedule_rows(spec: ArtifactSpec, programs: Programs, job: Job) -> NDArray[np.float32]:
    """float32 `[steps, R]`: what the step program is shown of each of the plan's timesteps."""
    rows = programs.call("schedule", {"timesteps": job.plan.timesteps.astype(np.float32)})["rows"]
    return guided_rows(spec, job.request, job.plan, np.asarray(rows, np.float32))


def prepared(spec: ArtifactSpec, programs: Programs, values: Mapping[str, Array]) -> dict[str, Array]:
    """What the step program takes besides x and row, for one branch of guidance."""
    constants = programs.call("prepare", values) if "prepare" in spec.programs else {}
    return step_inputs(spec, values, constants)


def prepared_branches(spec: ArtifactSpec, programs: Programs, job: Job, part: range) -> Branches:
    """`prepared` for both branches of guidance, or the one that there is."""
    values = {_core.Branch.CONDITIONAL: job.conditions(part), _core.Branch.UNCONDITIONAL: job.negative(part)}
    return {
        branch: with_label(job.request, len(part), prepared(spec, programs, given))
        for branch, given in values.items() if given is not None
    }  # fmt: skip


def first_latent(
    job: Job, part: range, x0: NDArray[np.float32] | None
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.float32]]:
    """(seeds, samples, x `[N, C, D, H, W]`) with which a batch begins."""
    seeds = np.full(len(part), job.request.seed, np.uint64)
    samples = job.samples(part)
    x = _core.normal(seeds, samples, 0, job.shape, np.dtype(np.float32))
    if x0 is not None:
        x = noised(job.plan, np.repeat(x0[None], len(part), axis=0), x)
    return seeds, samples, x
