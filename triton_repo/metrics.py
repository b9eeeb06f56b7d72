"""A service's metrics beside Triton's own, at its metrics port. Only within Triton's Python backend."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, final

import triton_python_backend_utils as pb_utils

from volcast.runtime.metrics import METRICS, SECONDS, Metric
from volcast.runtime.service import Service

PERIOD_S = 0.25
"""Each change is a message to Triton: they go in bundles, and none while nothing happens."""


@final
class Metrics:
    """Tells Triton what has changed, on a thread of its own until `close`."""

    def __init__(self, service: Service, labels: Mapping[str, str]) -> None:
        """`labels` go to every metric, beside its own."""
        self._service, self._labels = service, labels
        kinds = {"counter": pb_utils.MetricFamily.COUNTER, "gauge": pb_utils.MetricFamily.GAUGE,
                 "histogram": pb_utils.MetricFamily.HISTOGRAM}  # fmt: skip
        self._families = {
            one.name: pb_utils.MetricFamily(name=one.name, description=one.text, kind=kinds[one.kind])
            for one in METRICS
        }
        self._known = {one.name: one for one in METRICS}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._told: dict[tuple[str, str], float] = {}
        for one in METRICS:
            for value in one.values:
                self._metric(one, value)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="volcast metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tell the last changes and end."""
        self._closing.set()
        self._thread.join()
        # Before Triton's end of the connection goes, and metrics before their families.
        self._metrics.clear()
        self._families.clear()

    def _run(self) -> None:
        while not self._closing.wait(PERIOD_S):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        for key, total in self._service.totals().items():
            change = total - self._told.get(key, 0)
            if change:
                kind = self._known[key[0]]
                metric = self._metric(kind, key[1])
                if kind.kind == "gauge":
                    metric.set(total)
                else:
                    metric.increment(change)
                self._told[key] = total
        histogram = self._known["volcast_volume_seconds"]
        for phase, seconds in self._service.take_seconds():
            self._metric(histogram, phase).observe(seconds)

    def _metric(self, metric: Metric, value: str) -> Any:
        key = metric.name, value
        if key not in self._metrics:
            labels = {**self._labels, metric.label: value} if metric.label else dict(self._labels)
            buckets = {"buckets": list(SECONDS)} if metric.kind == "histogram" else {}
            self._metrics[key] = self._families[metric.name].Metric(labels=labels, **buckets)
        return self._metrics[key]
