"""Readiness: not whether a port is open, but whether a volume comes out."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import final

import numpy as np

from volcast.runtime.interface import text_of
from volcast.runtime.probe import probe_tensors
from volcast.runtime.spec import ArtifactSpec, Manifest

from .log import LOGGER
from .refusal import Refusal
from .upstream import Upstream

PROBE_S = 60.0
LOOK_S = 2.0
"""Between two looks at what the server does while a probe waits."""


@final
class Readiness:
    """For one event loop."""

    def __init__(
        self, spec: Manifest, upstream: Upstream, hold_s: float, counts: Callable[[], Awaitable[Mapping[str, float]]]
    ) -> None:  # fmt: skip
        """An answer holds for `hold_s` seconds, and so does a volume that a caller got meanwhile. `counts`: of the model's
        metrics, by name; those that cannot be read are left out."""
        self._upstream, self._hold_s, self._tensors = upstream, hold_s, probe_tensors(spec)
        self._counts = counts
        # A whole volume of a token model takes seconds: its first token tells, and ends the probe.
        self._tells = "volume" if isinstance(spec, ArtifactSpec) else "progress"
        if self._tells == "progress":
            self._tensors["progress_every"] = np.array([1], np.int32)
        self._lock = asyncio.Lock()
        self._known: tuple[float, str | None] = (-1e9, "nothing was asked yet")

    def seen(self) -> None:
        """A caller's volume has come."""
        self._known = time.monotonic(), None

    async def fault(self) -> str | None:
        """Why no volume comes out; None: one does."""
        async with self._lock:
            began = time.monotonic()
            if began - self._known[0] > self._hold_s:
                fault = await self._tried(began)
                # A caller's volume that came meanwhile says more than a probe that failed.
                if fault is None or self._known[0] < began:
                    self._known = time.monotonic(), fault
            return self._known[1]

    async def _tried(self, began: float) -> str | None:
        """What a probe finds; none is waited for that has no place yet, as a full queue is no fault either."""
        probe = asyncio.ensure_future(self._probe())
        try:
            before: Mapping[str, float] = {}
            while not (await asyncio.wait({probe}, timeout=LOOK_S))[0]:
                now = await self._counts()
                if self._known[0] >= began or _works(before, now):
                    return None
                before = before or now
            return probe.result()
        finally:
            probe.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await probe

    async def _probe(self) -> str | None:
        try:
            async with asyncio.timeout(PROBE_S):
                async with aclosing(self._upstream.answers(self._tensors, resend=False)) as answers:
                    async for one in answers:
                        kind = text_of(one["kind"])
                        return None if kind == self._tells else f"a probe was answered with {kind}"
            return "a probe was not answered"
        except TimeoutError:
            return f"no volume within {PROBE_S:g} s"
        except Refusal as refusal:
            if refusal.code == "unavailable" and "; retry in" in refusal.message:
                return None  # too much to do is no fault
            LOGGER.warning("not ready", extra={"fields": {"reason": refusal.message}})
            # Anyone may ask: the server's own words stay in the log.
            return refusal.message if refusal.code == "unavailable" else "the server fails; see the log"


def _works(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether steps beside a probe's own were taken, and samples wait for a place."""
    steps = "volcast_steps_total"
    return now.get("volcast_queue_length", 0) > 0 and now.get(steps, 0) > before.get(steps, math.inf) + 1
