"""Sampling with everything on the device: captured loops, and decoding beside the next batch's steps."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from volcast import _core
from volcast.kernels import plan_table
from volcast.runtime.job import Job, stack
from volcast.runtime.memory import PeakMemory
from volcast.runtime.programs import Programs
from volcast.runtime.report import Report, Stopwatch
from volcast.runtime.sampling import Images, Sampler, Watch, first_latent, prepared, schedule_rows
from volcast.runtime.spec import ArtifactSpec

from .decoding import Decoding, open_decoder
from .device import Device
from .model import DeviceModel
from .step_loop import LoopKey, Previews, Start, StepLoop

KEPT = 2
"""Captured loops that stay; the least recently used goes first. Each has its own memory."""


class _Captured(NamedTuple):
    loop: StepLoop
    decoding: Decoding
    decoded: _core.Event


class _Pending(NamedTuple):
    """A batch that is being decoded."""

    captured: _Captured
    plan: _core.Plan
    samples: NDArray[np.uint64]
    report: Report
    began: float


@final
class DeviceSampler(Sampler):
    """Runs jobs of one artifact on one device."""

    def __init__(
        self,
        spec: ArtifactSpec,
        device: Device,
        model: DeviceModel,
        programs: Programs,
        memory_limit: int | None,
    ) -> None:
        self._spec = spec
        self._device = device
        self._model = model
        self._programs = programs
        self._limit = memory_limit
        self._kept: OrderedDict[LoopKey, _Captured] = OrderedDict()

    def run(
        self, job: Job, parts: Sequence[range], x0: NDArray[np.float32] | None, watch: Watch
    ) -> Iterator[tuple[Images, Report]]:
        pending: _Pending | None = None
        for number, part in enumerate(parts):
            with self._device.errors(), torch.inference_mode():
                following = self._steps(job, part, x0, watch, (number, len(parts)))
                finished = None if pending is None else self._result(pending)
                self._decode(following.captured)
            pending = following
            if finished is not None:
                yield finished
        if pending is not None:
            with self._device.errors(), torch.inference_mode():
                finished = self._result(pending)
            yield finished

    def _steps(
        self, job: Job, part: range, x0: NDArray[np.float32] | None, watch: Watch, place: tuple[int, int]
    ) -> _Pending:
        spec, programs = self._spec, self._programs
        memory, watched = PeakMemory(), Stopwatch(programs)
        rows = schedule_rows(programs, job)
        schedule_seconds = watched.lap()
        branches = [prepared(spec, programs, stack(job.conditional, part))]
        if job.unconditional is not None:
            branches.insert(0, prepared(spec, programs, stack(job.unconditional, part)))
        prepare_seconds = watched.lap()

        seeds, samples, x = first_latent(job, part, x0)
        captured, open_seconds = self._captured(job, len(part), branches[0])
        watched.lap()
        loop = captured.loop
        loop.start(Start(job.plan, x, rows, tuple(branches), seeds, samples, job.request.guidance))
        timing = loop.run(watch.of_batch(*place, len(job.plan)), self._previews(captured.decoding, watch))
        loop_seconds = watched.lap()
        report = Report(
            engine="cuda",
            threads=1,
            scheduler=job.scheduler,
            steps=len(job.plan),
            batch=len(part),
            open_seconds=watched.open_seconds() + open_seconds,
            schedule_seconds=schedule_seconds,
            prepare_seconds=prepare_seconds,
            loop_seconds=loop_seconds,
            network_seconds=timing.total_s,
            decode_seconds=0.0,
            peak_bytes=memory.bytes(),
            peak_of_process=memory.since_start_of_process,
            device_bytes=self._model.bytes + loop.bytes + captured.decoding.bytes,
        )
        return _Pending(captured, job.plan, samples, report, time.perf_counter())

    def _decode(self, captured: _Captured) -> None:
        """Enqueue it. The decode before has been waited for, so its latent and image may be written over."""
        loop, decoding, decoded = captured
        handed = self._device.graphs.event()
        decoding.hand_over.launch(loop.stream)
        loop.stream.record(handed)
        decoding.stream.wait(handed)
        decoding.finish.launch(decoding.stream)
        decoding.stream.record(decoded)
        handed.synchronize()

    def _result(self, pending: _Pending) -> tuple[Images, Report]:
        decoding = pending.captured.decoding
        pending.captured.decoded.synchronize()
        decoding.check(pending.plan, pending.samples)
        images = decoding.image.numpy().copy()
        if not np.isfinite(images).all():
            raise ValueError(
                "[decode] the decoded volume is not finite; check the weights, or build with --precision bf16 or fp32"
            )
        seconds = time.perf_counter() - pending.began
        return images, pending.report.with_decode(seconds)

    def _previews(self, decoding: Decoding, watch: Watch) -> Previews | None:
        on_preview = watch.on_preview
        if on_preview is None or watch.preview_every == 0:
            return None
        if not decoding.previews:
            raise ValueError(
                "[sample] on_preview: no previews where memory makes the decode run in slabs; leave it out"
            )
        return Previews(
            watch.preview_every,
            decoding.snapshot,
            decoding.show,
            decoding.stream,
            lambda step: on_preview(step, decoding.preview.numpy().copy()),
        )

    def _captured(
        self, job: Job, batch: int, branch: dict[str, NDArray[np.generic]]
    ) -> tuple[_Captured, float]:
        """The captured loop for this job and batch, and the seconds that capturing took."""
        table = plan_table(job.plan.rows)
        key = LoopKey(
            batch=batch,
            shape=job.shape,
            steps=len(job.plan),
            guided=job.unconditional is not None,
            history_slots=table.history_slots,
            keeps_saved=table.keeps_saved,
            inputs=tuple((name, value.shape[1:]) for name, value in branch.items()),
        )
        began = time.perf_counter()
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            self._kept[key] = self._capture(key)
        self._kept.move_to_end(key)
        return self._kept[key], time.perf_counter() - began

    def _capture(self, key: LoopKey) -> _Captured:
        spec, model, graphs = self._spec, self._model, self._device.graphs
        free = self._device.free_bytes() if self._limit is None else self._limit - model.bytes
        loop = StepLoop(spec, model, graphs, graphs.stream(), key)
        left = None if free is None else free - loop.bytes
        if left is not None and left < 0:
            raise ValueError(
                f"[cuda] memory_limit={self._limit}: the weights and the loop take {model.bytes + loop.bytes} bytes; "
                "raise the limit, or give a smaller size or batch"
            )
        decoding = Decoding(graphs, loop, open_decoder(spec, model, key.shape, left))
        return _Captured(loop, decoding, graphs.event())
