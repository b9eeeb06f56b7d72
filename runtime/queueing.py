"""Samples one after the other, for models whose samples share no call of a network: a queue, a thread, futures."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import final

from volcast import _core

from .batching import Expired, Turns
from .exit import close_at_exit
from .request import SAMPLES_OF_A_SEED, OnStep
from .sizes import whole
from .volume import Volume

Job = Callable[[OnStep], Volume]
"""Makes one volume; calls back after each step, and what that raises ends it."""


@final
@dataclass(frozen=True, kw_only=True)
class QueueStats:
    """What `_core.BatcherStats` says of a batcher: samples that wait and that run, and calls so far by batch size."""

    queued: int
    active: int
    entries: int
    calls_of: Counter[int]


@final
class Queued(Future[Volume]):
    """One sample that waits or is under way. `cancel` takes it out before its next step, also when it has begun.

    Attributes:
        seconds: as `Sampling.seconds`.
    """

    def __init__(self, job: Job, turns: Turns, on_step: OnStep | None) -> None:
        super().__init__()
        self._job, self._on_step, self._withdrawn = job, on_step, False
        self._began = time.perf_counter()
        self._end = None if turns.deadline_s is None else self._began + turns.deadline_s
        self.priority = turns.priority
        self.seconds: dict[str, float] = {}

    def cancel(self) -> bool:
        self._withdrawn = not self.done()
        return self._withdrawn

    def fault(self, where: str) -> Exception | None:
        """Why it ends, None: it does not. `where`: how far it is."""
        if self._withdrawn:
            return CancelledError(f"[sample] cancelled {where}")
        if self._end is not None and time.perf_counter() > self._end:
            return Expired(
                f"[sample] {where}: its deadline cannot be met any more; give it more seconds (deadline_s, --timeout)"
            )
        return None

    def run(self, between: Callable[[], None]) -> None:
        """Make the volume and answer; `between` is called after each step."""

        def told(done: int, total: int) -> None:
            self.seconds.setdefault("first_step", time.perf_counter() - self._began)
            between()
            fault = self.fault(f"after {done} of {total} steps")
            if fault is not None:
                raise fault
            if self._on_step is not None:
                self._on_step(done, total)

        try:
            volume = self._job(told)
        except BaseException as error:  # noqa: BLE001  (it is the sample's answer, and the thread is for all)
            self.set_exception(error)
            return
        decode = 0.0 if volume.report is None else volume.report.decode_seconds
        self.seconds |= {"steps": time.perf_counter() - self._began - decode, "decode": decode}
        self.set_result(volume)


@final
class Queueing:
    """One thread that makes samples in the order of their priority, those of one priority as they came.

    Safe to use from any thread; `close` it; the interpreter's end cancels what is left.

    Attributes:
        steps: of samples that have been taken, those of samples that were cancelled among them.
    """

    def __init__(self, most: int) -> None:
        """At most `most` samples wait or are under way; a further one raises `_core.Overloaded`."""
        self._most, self.steps = most, 0
        self._waiting: list[Queued] = []
        self._current: Queued | None = None
        self._last_s = 1.0
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, job: Job, turns: Turns, on_step: OnStep | None) -> Queued:
        """A future of the job's volume; `on_step` runs on the queue's thread, and what it raises ends the sample.

        Raises `_core.Overloaded` when too many wait, ValueError when closed or for turns out of range.
        """
        if not -8 <= turns.priority <= 8:
            raise ValueError(f"[sample] priority={turns.priority}: need -8..8")
        one = Queued(job, turns, on_step)
        with self._changed:
            if self._closed:
                raise ValueError("[sample] the model is closed; load it again")
            count = len(self._waiting) + (self._current is not None)
            if count >= self._most:
                full = _core.Overloaded(f"[sample] {count} samples wait already")
                full.retry_s = self._last_s
                raise full
            self._waiting.append(one)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="volcast queue", daemon=True)
                self._thread.start()
                close_at_exit(self)
            self._changed.notify_all()
        return one

    def stats(self) -> QueueStats:
        with self._changed:
            return QueueStats(
                queued=len(self._waiting), active=int(self._current is not None), entries=self.steps,
                calls_of=Counter({1: self.steps}),
            )  # fmt: skip

    def close(self, *, drain: bool = False) -> None:
        """Take no more samples; finish those submitted (`drain`) or cancel them; end the thread."""
        with self._changed:
            self._closed = True
            for one in () if drain else (*self._waiting, *filter(None, [self._current])):
                one.cancel()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
            self._sweep()
            with self._changed:
                if not self._waiting:
                    continue
                one = max(self._waiting, key=lambda waiting: waiting.priority)  # the first of equals
                self._waiting.remove(one)
                self._current = one
            began = time.perf_counter()
            one.run(self._between)
            if one.exception() is None:  # what was cancelled tells nothing of how long the next takes
                self._last_s = time.perf_counter() - began

    def _between(self) -> None:
        self.steps += 1
        self._sweep()

    def _sweep(self) -> None:
        """Answer those that need not wait any more."""
        with self._changed:
            ended = [(one, fault) for one in self._waiting if (fault := one.fault("before its first step"))]
            for one, _ in ended:
                self._waiting.remove(one)
        for one, fault in ended:
            one.set_exception(fault)


def check_sample(sample: int) -> range:
    """The part of a seed's samples that holds this one alone. ValueError: none of them."""
    number = whole(sample)
    if type(number) is not int or not 0 <= number < SAMPLES_OF_A_SEED:
        raise ValueError(f"[sample] sample={sample!r}: need 0..{SAMPLES_OF_A_SEED - 1}")
    return range(number, number + 1)
