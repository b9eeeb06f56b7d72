"""A model as a server offers it: requests as tensors in, progress, previews and volumes as tensors out."""

from __future__ import annotations

import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, final

import numpy as np

from volcast import _core

from .answers import pack_volume, place_volume
from .asked import Asked, read_request
from .batching import Expired, Sampling, Turns
from .generator_model import GeneratorModel
from .interface import Array, as_bytes
from .metrics import Tally
from .pipeline import Model
from .queueing import Queued
from .region import Region, open_region
from .sampling import Images
from .token_model import TokenModel
from .volume import Volume, centred_affine

Reason = Literal["invalid", "unavailable", "cancelled", "internal"]
WATCH_S = 0.005
"""Between two looks at whether a caller is still there."""
_CANCELLED = "[request] cancelled"


class Reply(ABC):
    """Where the answers of one request go. `finish` or `fail` comes last, once."""

    @abstractmethod
    def send(self, tensors: Mapping[str, Array]) -> None: ...

    @abstractmethod
    def finish(self) -> None: ...

    @abstractmethod
    def fail(self, reason: Reason, text: str) -> None: ...

    @abstractmethod
    def cancelled(self) -> bool:
        """Whether the caller has gone."""


@dataclass(kw_only=True)
class _Open:
    """A request that has not been answered. `parts` counts what may still answer it."""

    asked: Asked
    reply: Reply
    seed: int
    region: Region | None = None
    parts: int = 1
    futures: list[Sampling | Queued] = field(default_factory=list)
    error: BaseException | None = None
    answered: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, error: BaseException) -> None:
        """The first error is the answer; the samples under way end."""
        with self.lock:
            self.error = self.error or error
            futures = list(self.futures)
        for future in futures:
            future.cancel()


@final
class Service:
    """Answers requests out of `model.submit`. Safe to use from any thread; `close` it."""

    def __init__(self, model: Model | TokenModel | GeneratorModel, *, most: int = 320) -> None:
        """`most`: the model's places for samples, active and waiting. So many requests are open at once, a further one is
        told to come again, and one of more volumes is refused."""
        self._model, self._most = model, most
        self._open: dict[int, _Open] = {}
        self._tickets: dict[int, _Open] = {}
        # A request and its cancellation come on streams of their own, in any order.
        self._withdrawn: deque[int] = deque(maxlen=256)
        self._known = threading.Lock()
        self._tally = Tally()
        self._closed = threading.Event()
        # Encoding an image or opening a program for a new size takes seconds, which who calls `accept` must not wait.
        self._starter = ThreadPoolExecutor(1, "volcast starts")
        self._watcher = threading.Thread(target=self._watch, name="volcast watches", daemon=True)
        self._watcher.start()

    def accept(self, tensors: Mapping[str, Array], reply: Reply) -> None:
        """Check a request and queue it; returns at once. `reply` hears all that becomes of it."""
        try:
            asked = read_request(self._model.spec, tensors)
            if asked.volumes > self._most:
                raise ValueError(
                    f"[request] {asked.volumes} volumes: ask for at most {self._most} at once, all that the server has "
                    "places for (--active, --queue)"
                )
            region = None if asked.region is None else open_region(asked.region)
        except ValueError as error:
            self._tally.refused("invalid")
            reply.fail("invalid", str(error))
            return
        if asked.cancel is not None:
            if region is not None:
                region.close()
            self._withdraw(asked.cancel)
            reply.finish()
            return
        seed = secrets.randbits(64) if asked.seed is None else asked.seed
        one = _Open(asked=asked, reply=reply, seed=seed, region=region)
        with self._known:
            full = len(self._open) >= self._most
            if not full and not self._closed.is_set():
                self._open[id(one)] = one
                self._tally.began()
                if asked.ticket is not None:
                    self._tickets[asked.ticket] = one
                    if asked.ticket in self._withdrawn:
                        one.error = CancelledError(_CANCELLED)
                self._starter.submit(self._start, one)
                return
        if region is not None:
            region.close()
        self._tally.refused("unavailable")
        reply.fail(
            "unavailable",
            "[request] the queue is full; retry in 1 s" if full else "[request] the server stops",
        )

    def totals(self) -> dict[tuple[str, str], float]:
        """Counters and gauges (metrics.py) by name and label value."""
        model = self._model
        return self._tally.totals(model.batching if isinstance(model, Model) else model.queueing)

    def take_seconds(self) -> list[tuple[str, float]]:
        """Phases of the volumes answered since the last call, and how long they took."""
        return self._tally.take_seconds()

    def close(self) -> None:
        """Take no more requests, answer those that are open, end every thread and the model."""
        with self._known:
            self._closed.set()
        self._starter.shutdown()
        self._model.close(drain=True)
        self._watcher.join()

    def _withdraw(self, ticket: int) -> None:
        """The caller waits for the answer that its request is cancelled, but not for the step under way."""
        with self._known:
            one = self._tickets.get(ticket)
            if one is None:
                self._withdrawn.append(ticket)
                return
        one.fail(CancelledError(_CANCELLED))
        with one.lock:
            answered, one.answered = one.answered, True
        if not answered:
            one.reply.fail("cancelled", _CANCELLED)

    def _start(self, one: _Open) -> None:
        try:
            for sample in range(one.asked.volumes):
                if one.error is not None:
                    break
                with one.lock:
                    one.parts += 1
                try:
                    future = self._submitted(one, sample)
                except BaseException:
                    with one.lock:
                        one.parts -= 1  # not the last: this thread's own is left
                    raise
                with one.lock:
                    one.futures.append(future)
                future.add_done_callback(partial(self._answer, one, sample))
        except Exception as error:  # noqa: BLE001  (it is the request's answer)
            one.fail(error)
        if one.error is not None:
            one.fail(one.error)  # a sample may have begun after the caller was seen to have gone
        self._release(one)

    def _submitted(self, one: _Open, sample: int) -> Sampling | Queued:
        asked = one.asked

        def on_step(done: int, total: int) -> None:
            if done == total or done - told[0] >= asked.progress_every:
                told[0] = done
                self._send(one, {**_counts("progress", sample, done), "steps": np.array([total], np.int32)})

        def on_preview(done: int, images: Images) -> None:
            image = images[0]
            affine = centred_affine(image.shape[1:], self._model.spec.spacing_mm)
            array = np.ascontiguousarray(image[0] if image.shape[0] == 1 else image)
            volume = Volume(array, affine, self._model.spec.spacing_mm)
            self._send(one, {**_counts("preview", sample, done), **pack_volume(volume, asked.output_format)})

        told = [0]
        # The other kinds of models have none.
        previews: Any = (
            {"on_preview": on_preview, "preview_every": asked.preview_every} if asked.preview_every else {}
        )
        return self._model.submit(
            one.seed, turns=Turns(priority=asked.priority, deadline_s=asked.deadline_s),
            on_step=on_step if asked.progress_every else None,
            **previews,
            **asked.arguments(sample),
        )  # fmt: skip

    def _answer(self, one: _Open, sample: int, done: Future[Volume]) -> None:
        try:
            volume = done.result(0)
            seconds = one.futures[sample].seconds
            if one.error is None:
                tensors: dict[str, Array] = {
                    "kind": as_bytes("volume"),
                    "sample": np.array([sample], np.int32),
                    "seed": np.array([one.seed], np.uint64),
                    "seconds": np.array([seconds["steps"], seconds["decode"]], np.float32),
                    **pack_volume(volume, one.asked.output_format),
                }
                weight = one.asked.weight(sample)
                if weight is not None:
                    tensors["guidance"] = np.array([weight], np.float64)
                if one.region is not None:
                    tensors = place_volume(tensors, one.asked.output_format, one.region)
                if self._send(one, tensors):
                    self._tally.made(seconds)
        except (Exception, CancelledError) as error:  # noqa: BLE001  (it is the request's answer)
            one.fail(error)
        self._release(one)

    def _release(self, one: _Open) -> None:
        with one.lock:
            one.parts -= 1
            if one.parts:
                return
            answered, one.answered = one.answered, True
        with self._known:
            del self._open[id(one)]
            if one.asked.ticket is not None and self._tickets.get(one.asked.ticket) is one:
                del self._tickets[one.asked.ticket]
        if one.region is not None:
            one.region.close()
        if one.error is None:
            self._tally.ended("done")
            one.reply.finish()
        else:
            reason, text = _told(one.error)
            self._tally.ended(reason)
            if not answered:
                one.reply.fail(reason, text)

    def _send(self, one: _Open, tensors: dict[str, Array]) -> bool:
        """Whether it was sent: nothing follows what ended a request."""
        with one.lock:
            if one.error is None:
                one.reply.send(tensors)
            return one.error is None

    def _watch(self) -> None:
        pause = WATCH_S
        while not (self._closed.wait(pause) and not self._open):
            began = time.thread_time()
            with self._known:
                requests = list(self._open.values())
            for one in requests:
                if one.error is None and one.reply.cancelled():
                    one.fail(CancelledError(_CANCELLED))
            # With many open requests a look costs more: it may take a twentieth of one core at most. Of the core and not
            # of the clock: on a busy machine the next look would come ten times too late.
            pause = max(WATCH_S, 20 * (time.thread_time() - began))


def _counts(kind: str, sample: int, step: int) -> dict[str, Any]:
    return {
        "kind": as_bytes(kind),
        "sample": np.array([sample], np.int32),
        "step": np.array([step], np.int32),
    }


def _told(error: BaseException) -> tuple[Reason, str]:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, _core.Overloaded):
        return "unavailable", f"{text}; retry in {max(0.1, error.retry_s):.1f} s"
    if isinstance(error, CancelledError | Expired):
        return "cancelled" if isinstance(error, CancelledError) else "unavailable", text
    return "invalid" if isinstance(error, ValueError) else "internal", text
