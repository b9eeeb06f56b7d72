"""OpenTelemetry: a span a request, sent where the environment's standard variables say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, final

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@final
class Tracing:
    """Needs the extra `otel`. OTLP over HTTP; OTEL_SERVICE_NAME and the other variables do what the standard says."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = os.environ.get("OTEL_SERVICE_NAME", "volcast")
        # Not the global one: a gateway is one of several things that a process may trace.
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("volcast.gateway")

    def record(
        self, headers: Mapping[str, str], route: str, began_ns: int, fields: Mapping[str, Any]
    ) -> None:
        """A request that has ended just now; `headers` may name its parent (W3C trace context)."""
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        span = self._tracer.start_span(
            f"{fields['method']} {route}", context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER, start_time=began_ns,
            attributes={
                "http.request.method": fields["method"], "http.route": route,
                "http.response.status_code": fields["status"],
                **{f"volcast.{key}": value for key, value in fields.items()
                   if key not in ("method", "status", "path", "seconds") and value is not None},
            },
        )  # fmt: skip
        if fields["status"] >= 500 or "code" in fields:
            span.set_status(StatusCode.ERROR, str(fields.get("code", "")))
        span.end()

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def tracing_from_environment() -> Tracing | None:
    """None: no variable names a collector. ValueError: one does, and the extra is missing."""
    given = [name for name in VARIABLES if os.environ.get(name)]
    try:
        return Tracing() if given else None
    except ModuleNotFoundError as error:
        raise ValueError(
            f"[gateway] ${given[0]} asks for traces, which need {error.name}: pip install 'volcast[otel]'"
        ) from error
