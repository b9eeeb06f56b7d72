"""Readiness: not whether a port is open, but whether a volume comes out."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import final

import numpy as np

from volcast.runtime.interface import Array, as_bytes, inputs, text_of
from volcast.runtime.sizes import latent_sizes
from volcast.runtime.spec import ArtifactSpec

from .log import LOGGER
from .refusal import Refusal
from .upstream import Upstream

PROBE_S = 60.0


@final
class Readiness:
    """For one event loop."""

    def __init__(self, spec: ArtifactSpec, upstream: Upstream, hold_s: float) -> None:
        """An answer holds for `hold_s` seconds, and so does a volume that a caller got meanwhile."""
        self._upstream, self._hold_s, self._tensors = upstream, hold_s, probe_tensors(spec)
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
                    kinds = [text_of(one["kind"]) async for one in answers]
            return None if kinds == ["volume"] else f"a probe was answered with {kinds}"
        except TimeoutError:
            return f"no volume within {PROBE_S:g} s"
        except Refusal as refusal:
            if refusal.code == "unavailable" and "; retry in" in refusal.message:
                return None  # too much to do is no fault
            LOGGER.warning("not ready", extra={"fields": {"reason": refusal.message}})
            # Anyone may ask: the server's own words stay in the log.
            return refusal.message if refusal.code == "unavailable" else "the server fails; see the log"


def probe_tensors(spec: ArtifactSpec) -> dict[str, Array]:
    """The smallest request: one step, conditions that must be given at their least."""
    _, sizes = latent_sizes(spec)
    dtypes = {tensor.name: tensor.dtype for tensor in inputs(spec)}
    found: dict[str, Array] = {
        "seed": np.array([0], np.uint64), "steps": np.array([1], np.int32), "priority": np.array([8], np.int32),
        "output_format": as_bytes("nifti"),
    }  # fmt: skip
    for condition in spec.conditions:
        if not condition.fields:
            shape = [
                sizes.get(one, spec.axis(one).minimum) if isinstance(one, str) else one
                for one in condition.shape
            ]
            found[condition.name] = np.full(shape or [1], condition.minimum or 0, dtypes[condition.name])
    return found
