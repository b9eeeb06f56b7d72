"""A memory limit on the host while samples share the network: what all threads take at once, and what is left to decode."""

from __future__ import annotations

import math
import threading
from typing import final

import numpy as np

from .engine import shapes
from .footprint import Footprint
from .host_memory import HostMemory
from .job import Job
from .memory_limit import Sizes, job_sizes
from .spec import ArtifactSpec


@final
class BatchMemory:
    """Keeps the limit of `memory` for a `Batching`, which asks with `admit` before every sample.

    Who submits opens and calls programs while the loop calls `step` and who answers decodes. Room is kept for `samples`
    samples under way, and for the steps of every size that was asked for, one sample a call, since they stay open.

    Attributes:
        decoding: held while latents are decoded, and while what is left for that changes.
    """

    def __init__(self, memory: HostMemory, spec: ArtifactSpec, samples: int) -> None:
        self._memory, self._spec, self._samples = memory, spec, samples
        self.decoding = threading.Lock()
        self._once: dict[str, Footprint] = {}  # schedule and prepare: open at one size each
        self._steps: dict[str, Footprint] = {}
        self._latents: dict[str, Sizes] = {}
        self._sample = 0

    def admit(self, job: Job) -> None:
        """Keep room for one sample of a job. Raises ValueError, with the least that would do, where there is none."""
        sizes = job_sizes(self._spec, job, 1)
        once: dict[str, Footprint] = {
            name: _larger(self._memory.footprint(name, sizes), self._once.get(name))
            for name in ("schedule", "prepare") if name in self._spec.programs
        }  # fmt: skip
        steps = {
            **self._steps,
            str(shapes(self._spec.programs["step"], sizes)): self._memory.footprint("step", sizes),
        }
        latents = {**self._latents, str(job.shape): sizes}
        sample = max(self._sample, self._bytes(job, sizes))
        taken = _at_once(list(once.values()), list(steps.values())) + self._samples * sample
        if taken > self._memory.taken or latents.keys() != self._latents.keys():
            with self.decoding:
                before, self._memory.taken = self._memory.taken, max(taken, self._memory.taken)
                try:
                    for one in latents.values():
                        self._memory.check_decode(one)
                except ValueError as error:
                    self._memory.taken = before
                    raise ValueError(
                        f"{error}; submit keeps {self._samples * sample} bytes for {self._samples} samples (active + queue)"
                    ) from error
        self._once, self._steps, self._latents, self._sample = once, steps, latents, sample

    def _bytes(self, job: Job, sizes: Sizes) -> int:
        """Of one sample under way (csrc/batcher.cpp): its latent, both outputs, what is told of it and its history;
        its rows; the further inputs of both branches."""
        plan, step = job.plan, self._spec.programs["step"]
        given = shapes(step, sizes)
        latents = 4 + plan.history_slots + plan.keeps_saved
        inputs = sum(
            math.prod(given[tensor.name]) * np.dtype(tensor.dtype).itemsize
            for tensor in step.inputs if tensor.name not in ("x", "row")
        )  # fmt: skip
        return 4 * (latents * math.prod(job.shape) + len(plan) * math.prod(given["row"])) + 2 * inputs


def _larger(one: Footprint, other: Footprint | None) -> Footprint:
    if other is None:
        return one
    return Footprint(
        opening=max(one.opening, other.opening),
        held=max(one.held, other.held),
        call=max(one.call, other.call),
    )


def _at_once(once: list[Footprint], steps: list[Footprint]) -> int:
    """All that is held, what one program takes more while it is opened or called, and a call of a step beside it."""
    programs = [*once, *steps]
    held = sum(program.held for program in programs)
    return (
        held
        + max(max(program.opening, program.call) for program in programs)
        + max(one.call for one in steps)
    )
