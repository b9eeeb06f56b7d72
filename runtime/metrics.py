"""What a service counts: one description for its server (triton_repo/metrics.py) and the docs, and the counting."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from .batching import Batching
from .queueing import Queueing

PHASES = ("first_step", "steps", "decode")
OUTCOMES = ("done", "invalid", "unavailable", "cancelled", "internal")
SECONDS = tuple(0.001 * 2.0**n for n in range(20))
"""Upper ends of the histogram's buckets: 1 ms to 9 minutes."""


@final
@dataclass(frozen=True, kw_only=True)
class Metric:
    """One Prometheus metric. `label`: its name, empty where it has none; `values`: those of the label that are known."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    label: str = ""
    values: tuple[str, ...] = ("",)
    text: str


METRICS = (
    Metric(name="volcast_open_requests", kind="gauge", text="requests under way"),
    Metric(name="volcast_queue_length", kind="gauge", text="samples that wait for a place"),
    Metric(name="volcast_active_samples", kind="gauge", text="samples that take turns"),
    Metric(name="volcast_network_calls_total", kind="counter", label="batch", values=(), text="calls of the step network, by batch size"),
    Metric(name="volcast_network_entries_total", kind="counter", text="entries of those batches; with guidance a step takes two, a token or one-pass model's one"),
    Metric(name="volcast_steps_total", kind="counter", text="steps taken, over all samples: denoising steps, tokens, or one a volume"),
    Metric(name="volcast_volumes_total", kind="counter", text="volumes answered"),
    Metric(name="volcast_last_volume_timestamp_seconds", kind="gauge", text="when the last volume was answered, Unix time"),
    Metric(name="volcast_requests_total", kind="counter", label="outcome", values=OUTCOMES, text="requests that have ended: done, refused (invalid, or unavailable: no place or no time), cancelled, failed"),
    Metric(name="volcast_volume_seconds", kind="histogram", label="phase", values=PHASES, text="of a volume: queue and first step, queue and all steps, decode"),
)  # fmt: skip


@final
class Tally:
    """What became of a service's requests. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._seconds: list[tuple[str, float]] = []
        self._open = self._volumes = 0
        self._last = 0.0

    def refused(self, outcome: str) -> None:
        """Count a request that never was under way, by one of `OUTCOMES`."""
        with self._lock:
            self._outcomes[outcome] += 1

    def began(self) -> None:
        """Count a request as under way."""
        with self._lock:
            self._open += 1

    def ended(self, outcome: str) -> None:
        """Count a request that was under way, by one of `OUTCOMES`."""
        with self._lock:
            self._open -= 1
            self._outcomes[outcome] += 1

    def made(self, seconds: Mapping[str, float]) -> None:
        """Count a volume that took `seconds`, by `PHASES`."""
        with self._lock:
            self._volumes += 1
            self._last = time.time()
            self._seconds += seconds.items()

    def totals(self, batching: Batching | Queueing | None) -> dict[tuple[str, str], float]:
        """Of every counter and gauge by name and label value."""
        with self._lock:
            found: dict[tuple[str, str], float] = {
                ("volcast_requests_total", outcome): count for outcome, count in self._outcomes.items()
            }
            found["volcast_open_requests", ""] = self._open
            found["volcast_volumes_total", ""] = self._volumes
            found["volcast_last_volume_timestamp_seconds", ""] = self._last
        if batching is not None:
            stats = batching.stats()
            found["volcast_queue_length", ""] = stats.queued
            found["volcast_active_samples", ""] = stats.active
            found["volcast_network_entries_total", ""] = stats.entries
            found["volcast_steps_total", ""] = batching.steps
            for size, calls in stats.calls_of.items():
                found["volcast_network_calls_total", str(size)] = calls
        return found

    def take_seconds(self) -> list[tuple[str, float]]:
        """What `made` was told since the last call: what the histogram has yet to observe."""
        with self._lock:
            taken, self._seconds = self._seconds, []
        return taken
