"""One batch of a job, from noise to images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from .autoencoder import decode
from .denoiser import Denoiser, step_inputs
from .engine import Engine
from .job import Job, stack
from .memory import PeakMemory
from .programs import Programs
from .report import Report, Stopwatch
from .sampler import noised
from .spec import ArtifactSpec

Array = NDArray[np.generic]


def sample_batch(
    spec: ArtifactSpec,
    engine: Engine,
    programs: Programs,
    job: Job,
    part: range,
    x0: NDArray[np.float32] | None,
    after: Callable[[int, int], None] | None,
) -> tuple[NDArray[np.float32], Report]:
    """The images `[N, 1, D, H, W]` of the samples `part` of the job, and what they cost.

    `x0` `[C, D', H', W']` is a latent to start from instead of pure noise; `after(done, steps)` follows each step.
    """
    memory = PeakMemory()
    watch = Stopwatch(programs)
    rows = programs.call("schedule", {"timesteps": job.plan.timesteps.astype(np.float32)})["rows"]
    schedule_seconds = watch.lap()
    branches = {_core.Branch.CONDITIONAL: _prepare(spec, programs, stack(job.conditional, part))}
    if job.unconditional is not None:
        branches[_core.Branch.UNCONDITIONAL] = _prepare(spec, programs, stack(job.unconditional, part))
    prepare_seconds = watch.lap()

    seeds = np.full(len(part), job.request.seed, np.uint64)
    samples = np.arange(part.start, part.stop, dtype=np.uint64)
    x = _core.normal(seeds, samples, 0, job.shape, np.dtype(np.float32))
    if x0 is not None:
        x = noised(job.plan, np.repeat(x0[None], len(part), axis=0), x)
    shapes = {name: value.shape for name, value in branches[_core.Branch.CONDITIONAL].items()}
    step = programs.open("step", {"x": x.shape, "row": (len(part), *rows.shape[1:]), **shapes})
    denoiser = Denoiser(step, rows, branches)
    # Two calls a step with guidance: a doubled batch would open every program at another shape.
    timing = _core.run(job.plan, x, denoiser, seeds, samples, guidance=job.request.guidance, on_step=after)
    loop_seconds = watch.lap()

    images = decode(spec, programs, x)
    decode_seconds = watch.lap()
    return images, Report(
        engine=engine.name,
        threads=engine.threads,
        scheduler=job.scheduler,
        steps=len(job.plan),
        batch=len(part),
        open_seconds=watch.open_seconds(),
        schedule_seconds=schedule_seconds,
        prepare_seconds=prepare_seconds,
        loop_seconds=loop_seconds,
        network_seconds=timing.network_s,
        decode_seconds=decode_seconds,
        peak_bytes=memory.bytes(),
        peak_of_process=memory.since_start_of_process,
    )


def _prepare(spec: ArtifactSpec, programs: Programs, values: Mapping[str, Array]) -> dict[str, Array]:
    constants = programs.call("prepare", values) if "prepare" in spec.programs else {}
    return step_inputs(spec, values, constants)
