"""Many requests at once: samples share the network's calls step by step, and each is answered by a future."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from .autoencoder import Given, decode, decoder_conditions, encode
from .batch_memory import BatchMemory
from .engine import Engine
from .exit import close_at_exit
from .host_memory import HostMemory
from .inpaint import Known
from .job import Job
from .lanes import COUNTS, LaneReport, open_lanes
from .programs import Programs
from .request import OnStep
from .sampling import Images, first_latent, prepared_branches, schedule_rows
from .spec import ArtifactSpec
from .volume import Volume, centred_affine

Array = NDArray[np.generic]
OnPreview = Callable[[int, Images], None]


class Expired(ValueError):
    """A sample's deadline passed, or could not be met any more."""


@final
@dataclass(frozen=True, kw_only=True)
class Turns:
    """How a sample shares the network with others.

    Attributes:
        priority: -8..8; each level doubles its share, or where samples share no calls (`Queueing`) higher ones go first.
        deadline_s: seconds from now; None: none. A sample that cannot meet it any more ends with `Expired`.
    """

    priority: int = 0
    deadline_s: float | None = None


@final
class Sampling(Future[Volume]):
    """One sample under way. `cancel` takes it out before its next step, also when it has begun.

    Attributes:
        seconds: of wall time by name, once done: until the first step was seen to be done ("first_step", not before the
            volume that is decoded meanwhile), queue and steps together ("steps"), and "decode".
    """

    def __init__(self, batcher: _core.Batcher) -> None:
        super().__init__()
        self._batcher = batcher
        self.id = 0
        self.seconds: dict[str, float] = {}

    def cancel(self) -> bool:
        return self._batcher.cancel(self.id)


@dataclass(kw_only=True)
class _Open:
    """What the answering thread knows of a sample."""

    sampling: Sampling
    shape: tuple[int, ...]
    given: Given
    known: Known | None
    frame: tuple[NDArray[np.float64], tuple[float, ...]] | None
    on_step: OnStep | None
    on_preview: OnPreview | None
    began: float
    step: int = 0


@final
class Batching:
    """Two threads over one artifact: one takes turns in C++ (csrc/batcher.hpp), one decodes and answers.

    Safe to use from any thread. `close` it, or use it as a context manager; the interpreter's end cancels what is left.
    """

    def __init__(
        self, folder: Path, spec: ArtifactSpec, engine: Engine, memory: HostMemory | None = None, *,
        active: int = 64, queue: int = 256,
    ) -> None:  # fmt: skip
        """`active` samples take turns, `queue` more may wait; a further one raises `_core.Overloaded`.

        `memory` keeps a limit, and nothing else may open programs under it.
        """
        self._spec = spec
        self._room = None if memory is None else BatchMemory(memory, spec, active + queue)
        # Programs are not for two threads at once: one set each for who submits, the loop, and who answers.
        self._host, self._loop, self._answer = (
            Programs(folder, spec, engine, one) for one in (memory, None, memory)
        )
        self._batcher = _core.Batcher(active=active, queue=queue)
        self._groups: dict[Any, int] = {}
        self._rows: tuple[Any, NDArray[np.float32]] | None = None
        self.lanes: dict[tuple[int, ...], list[LaneReport]] = {}
        self.steps = 0
        """Steps of samples that have been taken, those of samples that were cancelled among them."""
        self._open: dict[int, _Open] = {}
        self._submitting = threading.Lock()
        self._known = threading.Lock()
        self._threads = [
            threading.Thread(target=self._batcher.run, name="volcast steps", daemon=True),
            threading.Thread(target=self._answers, name="volcast answers", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        close_at_exit(self)

    def __enter__(self) -> Batching:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, drain: bool = False) -> None:
        """Take no more samples; finish those submitted (`drain`) or cancel them; end both threads."""
        self._batcher.close(drain=drain)
        for thread in self._threads:
            thread.join()

    def stats(self) -> _core.BatcherStats:
        return self._batcher.stats()

    def encode(self, image: Volume | Array) -> NDArray[np.float32]:
        """`Model.encode`, from any thread."""
        with self._submitting:
            if self._room is None:
                return encode(self._spec, self._host, image)
            with self._room.decoding:
                self._answer.close("decode")
                return encode(self._spec, self._host, image)

    def submit(
        self,
        job: Job,
        sample: int,
        *,
        turns: Turns = Turns(),
        x0: NDArray[np.float32] | None = None,
        frame: tuple[NDArray[np.float64], tuple[float, ...]] | None = None,
        on_step: OnStep | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 0,
    ) -> Sampling:
        """Sample number `sample` of a job; callbacks run on the answering thread, and what they raise ends the sample.

        Raises `_core.Overloaded` when too many wait, ValueError when closed or for settings out of range.
        """
        sampling = Sampling(self._batcher)
        part = range(sample, sample + 1)
        with self._submitting:
            if self._room is not None:
                self._room.admit(job)
            rows = self._rows_of(job)
            branches = prepared_branches(self._spec, self._host, job, part)
            conditional = branches[_core.Branch.CONDITIONAL]
            unconditional = branches.get(_core.Branch.UNCONDITIONAL, {})
            group = self._group(job.shape, rows.shape[1], conditional)
            _, _, x = first_latent(job, part, x0)
            known = job.known
            # The answer may come before `submit` returns: it waits for the lock.
            with self._known:
                sampling.id = self._batcher.submit(
                    group, job.plan, x, rows, list(conditional.values()), list(unconditional.values()),
                    seed=job.request.seed, sample=sample, guidance=job.request.guidance, priority=turns.priority,
                    deadline_s=turns.deadline_s, preview_every=preview_every,
                    known=None if known is None else known.x0, keep=None if known is None else known.keep,
                )  # fmt: skip
                sampling.set_running_or_notify_cancel()
                self._open[sampling.id] = _Open(
                    sampling=sampling, shape=job.shape, given=decoder_conditions(self._spec, job, part), known=known,
                    frame=frame,
                    on_step=on_step, on_preview=on_preview,
                    began=time.perf_counter(),
                )  # fmt: skip
        return sampling

    def _rows_of(self, job: Job) -> NDArray[np.float32]:
        """`schedule_rows`, made once for the samples of a request: a long plan's take the time of many steps."""
        if self._room is not None:  # its limit counts no rows that are kept
            return schedule_rows(self._spec, self._host, job)
        plan, request = job.plan, job.request
        key = plan.timesteps.tobytes(), plan.rows.tobytes(), request.label, request.scale
        if self._rows is None or self._rows[0] != key:
            self._rows = key, schedule_rows(self._spec, self._host, job)
        return self._rows[1]

    def _group(self, shape: tuple[int, ...], row: int, inputs: Mapping[str, Array]) -> int:
        key = (shape, row, tuple((name, value.shape, value.dtype.str) for name, value in inputs.items()))
        if key not in self._groups:
            # Larger batches would take the memory of a program each.
            counts = COUNTS if self._room is None else (1,)
            lanes, reports = open_lanes(self._loop, shape, row, inputs, counts)
            self.lanes[shape] = reports
            self._groups[key] = self._batcher.add_group(lanes)
        return self._groups[key]

    def _answers(self) -> None:
        while not self._batcher.ended:
            for event in self._batcher.wait(1.0):
                with self._known:
                    one = self._open[event.id]
                # A preview may come behind the progress of a later step.
                self.steps += max(0, event.step - one.step)
                one.step = max(one.step, event.step)
                if event.step:
                    one.sampling.seconds.setdefault("first_step", time.perf_counter() - one.began)
                try:
                    self._answer_one(event, one)
                except BaseException as error:  # noqa: BLE001  (a callback's, or the decoder's: it ends its own sample, not the thread)
                    self._batcher.cancel(event.id)
                    if not one.sampling.done():
                        one.sampling.set_exception(error)
                if event.happened not in (_core.Happened.PROGRESS, _core.Happened.PREVIEW):
                    with self._known:
                        del self._open[event.id]

    def _answer_one(self, event: _core.BatchEvent, one: _Open) -> None:
        sampling = one.sampling
        if sampling.done():  # failed in a callback
            return
        if event.happened == _core.Happened.PROGRESS:
            if one.on_step is not None:
                one.on_step(event.step, event.steps)
        elif event.happened == _core.Happened.PREVIEW:
            if one.on_preview is not None:
                one.on_preview(event.step, self._decoded(event, one))
        elif event.happened == _core.Happened.FINISHED:
            if one.on_step is not None:
                one.on_step(event.steps, event.steps)
            stepped = time.perf_counter()
            volume = self._volume(event, one)
            sampling.seconds |= {"steps": stepped - one.began, "decode": time.perf_counter() - stepped}
            sampling.set_result(volume)
        elif event.happened == _core.Happened.CANCELLED:
            sampling.set_exception(
                CancelledError(f"[sample] cancelled after {event.step} of {event.steps} steps")
            )
        elif event.happened == _core.Happened.EXPIRED:
            sampling.set_exception(
                Expired(
                    f"[sample] after {event.step} of {event.steps} steps: its deadline cannot be met any more; "
                    "give it more seconds (deadline_s, --timeout), or ask for fewer steps"
                )
            )
        else:
            sampling.set_exception(ValueError(event.text))

    def _decoded(self, event: _core.BatchEvent, one: _Open) -> Images:
        assert event.x is not None
        with contextlib.nullcontext() if self._room is None else self._room.decoding:
            images = decode(self._spec, self._answer, event.x.reshape(1, *one.shape), one.given)
        return images if one.known is None else one.known.pasted(images)

    def _volume(self, event: _core.BatchEvent, one: _Open) -> Volume:
        image = self._decoded(event, one)[0]
        spacing = self._spec.spacing_mm
        affine, spacing = one.frame or (centred_affine(image.shape[1:], spacing), spacing)
        return Volume(np.ascontiguousarray(image[0] if image.shape[0] == 1 else image), affine, spacing)
