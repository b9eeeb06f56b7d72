"""What the gateway counts, joined with what Triton counts."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Callable, Mapping
from typing import final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@final
class Metrics:
    """One registry, so that two gateways in one process do not count together."""

    def __init__(
        self, triton: str | None, open_requests: Callable[[], int], store_bytes: Callable[[], int]
    ) -> None:
        """`triton`: host and port of its metrics."""
        registry = self._registry = CollectorRegistry()
        self._triton = triton
        self.requests = Counter(
            "volcast_gateway_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "volcast_gateway_request_seconds",
            "Time to the end of the answer",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.generations = Counter(
            "volcast_gateway_generations",
            "Requests for volumes by how they ended",
            ["outcome"],
            registry=registry,
        )
        self.first = Histogram(
            "volcast_gateway_first_answer_seconds",
            "From a checked request to the first report, preview or volume",
            registry=registry,
            buckets=_SECONDS,
        )
        self.volume = Histogram(
            "volcast_gateway_volume_seconds",
            "From a checked request to each volume",
            registry=registry,
            buckets=_SECONDS,
        )
        self.resent = Counter(
            "volcast_gateway_resent", "Requests sent again because the server was replaced", registry=registry
        )
        self.ready = Gauge("volcast_gateway_ready", "What /health/ready said last", registry=registry)
        self._joined = Gauge(
            "volcast_gateway_triton_metrics_up", "Whether Triton's metrics stand below", registry=registry
        )
        Gauge(
            "volcast_gateway_open_requests", "Requests for volumes under way", registry=registry
        ).set_function(open_requests)
        Gauge(
            "volcast_gateway_store_bytes", "Bytes of volumes kept for their callers", registry=registry
        ).set_function(store_bytes)

    async def text(self) -> bytes:
        """Prometheus's text format: the gateway's own, then Triton's."""
        theirs = await self._theirs()
        self._joined.set(bool(theirs))
        return bytes(generate_latest(self._registry)) + theirs

    async def served(self, model: str) -> Mapping[str, float]:
        """What `runtime/metrics.py` counts of a model, labels of its own summed; nothing: Triton's metrics cannot be read."""
        found = dict[str, float]()
        try:
            for family in text_string_to_metric_families((await self._theirs()).decode()):
                for one in family.samples:
                    if one.name.startswith("volcast_") and one.labels.get("model") == model:
                        found[one.name] = found.get(one.name, 0) + one.value
        except ValueError:
            return {}  # no Triton listens there
        return found

    async def _theirs(self) -> bytes:
        return b"" if self._triton is None else await asyncio.to_thread(_read, self._triton)


def _read(address: str) -> bytes:
    # Not urllib: it would ask a proxy from the environment.
    connection = http.client.HTTPConnection(address, timeout=2)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        content = answer.read(2**24)
        return content if answer.status == 200 else b""
    except (OSError, http.client.HTTPException):
        return b""
    finally:
        connection.close()
