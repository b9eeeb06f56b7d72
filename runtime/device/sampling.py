"""Sampling with everything on the device: captured loops, and decoding beside the next batch's steps."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray

from volcast import _core
from volcast.kernels import plan_table
from volcast.runtime.intensity import IntensitySpec, written
from volcast.runtime.job import Job
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
RESERVE = 0.1
"""Of what is free, where no limit is given: workspaces of libraries, gaps between blocks."""

_opening = threading.Lock()
"""PyTorch captures one graph at a time in a process, and two that measure what is free would both take it."""


@final
class _Captured:
    """A captured loop with its decoding. `pending`: the batch whose images are made in the decoding's memory."""

    def __init__(self, loop: StepLoop, decoding: Decoding, decoded: _core.Event) -> None:
        self.loop, self.decoding, self.decoded = loop, decoding, decoded
        self.pending: _Pending | None = None

    def settle(self) -> None:
        """Take the images out, so that others may be made; whoever waits for them finds them, or what went wrong."""
        if self.pending is not None:
            self.pending.settle()


@final
class _Pending:
    """A batch that is being decoded."""

    def __init__(
        self,
        captured: _Captured,
        plan: _core.Plan,
        samples: NDArray[np.uint64],
        report: Report,
        intensity: IntensitySpec | None,
    ) -> None:
        self.captured: _Captured | None = captured
        self._plan, self._samples, self._report, self._intensity = plan, samples, report, intensity
        self._began = time.perf_counter()
        self._images: Images | None = None
        self._failure: Exception | None = None

    def settle(self) -> None:
        """Wait for the images and copy them; once. Lets go of the captured loop, which may be in another's way."""
        captured = self.captured
        if captured is None:
            return
        try:
            captured.decoded.synchronize()
            captured.decoding.check(self._plan, self._samples)
            self._images = captured.decoding.image.numpy().copy()
        except Exception as error:  # noqa: BLE001  told to whoever asks for the result
            self._failure = error
        self._report = self._report.with_decode(time.perf_counter() - self._began)
        captured.pending = self.captured = None

    def result(self) -> tuple[Images, Report]:
        self.settle()
        if self._failure is not None:
            raise self._failure
        assert self._images is not None
        if not np.isfinite(self._images).all():
            raise ValueError(
                "[decode] the decoded volume is not finite; check the weights, or build with --precision bf16 or fp32"
            )
        return written(self._intensity, self._images), self._report


@final
class DeviceSampler(Sampler):
    """Runs jobs of one artifact on one device."""

    inpaints: ClassVar[bool] = False

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
        try:
            for number, part in enumerate(parts):
                with self._device.errors(), torch.inference_mode():
                    following = self._steps(job, part, x0, watch, (number, len(parts)))
                    finished = None if pending is None else pending.result()
                    self._decode(following)
                pending = following
                if finished is not None:
                    yield finished
            if pending is not None:
                with self._device.errors(), torch.inference_mode():
                    finished = pending.result()
                yield finished
        finally:  # also where the caller takes no more: nothing is left running
            if pending is not None:
                pending.settle()

    def _steps(
        self, job: Job, part: range, x0: NDArray[np.float32] | None, watch: Watch, place: tuple[int, int]
    ) -> _Pending:
        spec, programs = self._spec, self._programs
        memory, watched = PeakMemory(), Stopwatch(programs)
        rows = schedule_rows(self._spec, programs, job)
        schedule_seconds = watched.lap()
        branches = [prepared(spec, programs, job.conditions(part))]
        negative = job.negative(part)
        if negative is not None:
            branches.insert(0, prepared(spec, programs, negative))
        prepare_seconds = watched.lap()

        captured, open_seconds = self._captured(job, len(part), branches[0])
        seeds, samples, x = first_latent(job, part, x0)
        watched.lap()
        loop = captured.loop
        guidance = job.guidance(part)
        assert not isinstance(guidance, tuple)  # Sampler.mixes_weights
        loop.start(Start(job.plan, x, rows, tuple(branches), seeds, samples, guidance))
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
            device_bytes=self._bytes(),
        )
        return _Pending(captured, job.plan, samples, report, spec.intensity)

    def _decode(self, batch: _Pending) -> None:
        """Enqueue it, when the images of the batch before are out of the way."""
        captured = batch.captured
        assert captured is not None
        captured.settle()
        loop, decoding, decoded = captured.loop, captured.decoding, captured.decoded
        handed = self._device.graphs.event()
        decoding.hand_over.launch(loop.stream)
        loop.stream.record(handed)
        decoding.stream.wait(handed)
        decoding.finish.launch(decoding.stream)
        decoding.stream.record(decoded)
        captured.pending = batch
        handed.synchronize()

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
            lambda step: on_preview(step, written(self._spec.intensity, decoding.preview.numpy().copy())),
        )

    @cached_property
    def _streams(self) -> tuple[_core.Stream, _core.Stream]:
        """For steps and for decoding, of all captured loops: PyTorch keeps workspaces of libraries for every stream."""
        return self._device.graphs.stream(), self._device.graphs.stream()

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
            with _opening:
                self._kept[key] = self._opened(key)
        self._kept.move_to_end(key)
        return self._kept[key], time.perf_counter() - began

    def _opened(self, key: LoopKey) -> _Captured:
        """Beside those that are kept; where memory does not suffice for that, in their place."""
        self._let_go(KEPT - 1)
        captured = None
        try:
            captured = self._capture(key)
        except Exception:  # whatever it is: alone it may go well, or fail again
            if not self._kept:
                raise
        if self._kept and (captured is None or not captured.decoding.previews):
            captured = None
            self._let_go(0)
            captured = self._capture(key)
        assert captured is not None
        return captured

    def _let_go(self, most: int) -> None:
        """Keep `most`; the least recently used go."""
        while len(self._kept) > most:
            _, oldest = self._kept.popitem(last=False)
            oldest.settle()
            del oldest

    def _bytes(self) -> int:
        """The device memory of the weights and of all that is kept."""
        return self._model.bytes + sum(one.loop.bytes + one.decoding.bytes for one in self._kept.values())

    def _capture(self, key: LoopKey) -> _Captured:
        spec, model, graphs = self._spec, self._model, self._device.graphs
        steps, decodes = self._streams
        loop = StepLoop(spec, model, graphs, steps, key)
        taken = self._bytes() + loop.bytes
        if self._limit is None:
            free = self._device.free_bytes()
            left = None if free is None else int(free * (1 - RESERVE))
        elif taken <= self._limit:
            left = self._limit - taken
        else:
            raise ValueError(
                f"[cuda] memory_limit={self._limit}: the weights and the loop take {taken} bytes; "
                "raise the limit, or give a smaller size or batch"
            )
        decoding = Decoding(graphs, loop, open_decoder(spec, model, key.shape, left), decodes)
        return _Captured(loop, decoding, graphs.event())
