"""Readiness: not whether a port is open, but whether a volume comes out."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import final

import numpy as np

from volcast.runtime.interface import text_of
from volcast.runtime.probe import probe_tensors
from volcast.runtime.spec import ArtifactSpec, Manifest

from .log import LOGGER
from .refusal import Refusal
from .upstream import Upstream

PROBE_S = 60.0


@final
class Readiness:
    """For one event loop."""

    def __init__(self, spec: Manifest, upstream: Upstream, hold_s: float) -> None:
        """An answer holds for `hold_s` seconds, and so does a volume that a caller got meanwhile."""
        self._upstream, self._hold_s, self._tensors = upstream, hold_s, probe_tensors(spec)
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
            when, fault = self._known
            if time.monotonic() - when > self._hold_s:
                fault = await self._probe()
                self._known = time.monotonic(), fault
            return fault

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
