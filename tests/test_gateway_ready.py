"""What readiness says of a server that does not answer a probe: it works for others, or it does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from gateways import GENERATE, gateway, until
from grpc_servers import listening
from served import Served
from tritonclient.grpc import service_pb2, service_pb2_grpc

from volcast.runtime.artifact import read_artifact
from volcast.runtime.interface import inputs
from volcast.runtime.spec import ArtifactSpec
from volcast.triton_repo.gateway import health
from volcast.triton_repo.gateway.health import Readiness
from volcast.triton_repo.gateway.metrics import Metrics
from volcast.triton_repo.gateway.upstream import Upstream


class Full(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Takes a request, and ends it once `free` is set."""

    def __init__(self, spec: ArtifactSpec) -> None:
        self._spec, self.free = spec, threading.Event()

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.RepositoryIndexResponse()

    def ModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        answer = service_pb2.ModelMetadataResponse()
        names = {"int32": "INT32", "uint64": "UINT64", "uint8": "UINT8", "float32": "FP32", "float64": "FP64"}
        for one in inputs(self._spec):
            answer.inputs.add(name=one.name, datatype=names[one.dtype], shape=one.shape)
        return answer

    def ModelStreamInfer(self, requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for request in requests:
            if any(one.name == "cancel" for one in request.inputs):
                self.free.set()
            self.free.wait()
            yield service_pb2.ModelStreamInferResponse(error_message="[request] cancelled")


def fault(
    gaussian: Path, during: Callable[[Readiness], None], counts: Callable[[], Mapping[str, float]]
) -> str | None:
    """`during` runs beside the probe, at each look."""

    async def ask(address: str) -> str | None:
        upstream = Upstream(address, "gaussian", patience_s=60)

        async def counted() -> Mapping[str, float]:
            during(readiness)
            return counts()

        readiness = Readiness(spec, upstream, 1e9, counted)
        try:
            found = await readiness.fault()
            assert await readiness.fault() == found
            return found
        finally:
            await upstream.close()

    spec = read_artifact(gaussian)
    server = Full(spec)
    with listening(server) as address:
        try:
            return asyncio.run(ask(address))
        finally:
            server.free.set()


def nothing(_: Readiness) -> None:
    pass


def test_a_probe_that_waits_for_a_place_is_no_fault(gaussian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_S", 0.05)
    steps = iter(range(0, 10**9, 64))
    assert (
        fault(gaussian, nothing, lambda: {"volcast_steps_total": next(steps), "volcast_queue_length": 1})
        is None
    )
    assert fault(gaussian, Readiness.seen, dict) is None


@pytest.mark.parametrize("queue", [0, 1])
def test_a_server_that_takes_no_step_is_not_ready(
    gaussian: Path, monkeypatch: pytest.MonkeyPatch, queue: int
) -> None:
    monkeypatch.setattr(health, "LOOK_S", 0.01)
    monkeypatch.setattr(health, "PROBE_S", 0.3)
    still = {"volcast_steps_total": 5.0, "volcast_queue_length": float(queue)}
    assert fault(gaussian, nothing, lambda: still) == "no volume within 0.3 s"
    assert fault(gaussian, nothing, dict) == "no volume within 0.3 s"


def test_a_volume_that_came_during_a_probe_is_newer_than_its_failure(
    gaussian: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def probe(self: Readiness) -> str:
        self.seen()
        return "a probe failed"

    monkeypatch.setattr(Readiness, "_probe", probe)
    assert fault(gaussian, nothing, dict) is None


def test_what_the_server_counts_is_read(gaussian: Path, served: Served) -> None:
    with gateway(gaussian, served) as running, httpx.Client(base_url=running.url, timeout=60) as client:
        assert client.post(GENERATE, json={"steps": 7}).status_code == 200
    metrics = Metrics(f"127.0.0.1:{served.metrics}", lambda: 0, lambda: 0)
    found = until(
        lambda: (told := asyncio.run(metrics.served("gaussian"))).get("volcast_steps_total", 0) >= 7 and told
    )
    assert "volcast_queue_length" in found and not asyncio.run(metrics.served("another"))


def test_what_is_no_metrics_text_counts_nothing() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = b"<html>{{{\xff"
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        metrics = Metrics(f"127.0.0.1:{server.server_port}", lambda: 0, lambda: 0)
        assert asyncio.run(metrics.served("gaussian")) == {}
        server.shutdown()
