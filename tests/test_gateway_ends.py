"""How a gateway ends, and what its callers notice of a server that ends."""

from __future__ import annotations

import gzip
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
from gateways import EVENTS, GENERATE, LONG, counted, events, gateway, until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from served import Served

from volcast.runtime.pipeline import load
from volcast.runtime.volume import read_nifti
from volcast.triton_repo.gateway import drain
from volcast.triton_repo.gateway.server import Gateway
from volcast.triton_repo.gateway.settings import Listening
from volcast.triton_repo.gateway.tracing import tracing_from_environment


def follow(client: httpx.Client, body: dict[str, Any], begun: threading.Event) -> list[tuple[str, Any]]:
    """All events; `begun` is set after a tenth of the steps."""
    told = []
    with client.stream("POST", GENERATE, json=body, headers=EVENTS) as answer:
        for name, value in events(answer):
            told.append((name, value))
            if name == "progress" and value["step"] >= 100:
                begun.set()
    return told


def stopping(running: Gateway) -> threading.Thread:
    ending = threading.Thread(target=running.stop)
    ending.start()
    return ending


def test_what_is_open_ends_and_what_comes_is_sent_away(
    gaussian: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "FETCH_S", 600)
    begun = threading.Event()
    with (
        gateway(gaussian, served, drain_s=600) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        open_one = pool.submit(follow, client, {**LONG, "num_samples": 8}, begun)
        assert begun.wait(60)
        ending = stopping(running)
        refused = until(lambda: (answer := client.post(GENERATE, json={})).status_code == 503 and answer)
        assert refused.json()["error"]["code"] == "unavailable" and int(refused.headers["retry-after"]) > 0
        assert (
            client.get("/health/ready").status_code == 503 and client.get("/health/live").status_code == 200
        )
        told = open_one.result(60)
        assert told[-1] == ("end", {})
        for url in [value["url"] for name, value in told if name == "volume"]:
            assert client.get(url).status_code == 200  # the gateway waits for its callers to fetch them
        ending.join(60)
        assert not ending.is_alive()
        with pytest.raises(httpx.ConnectError):
            client.get("/health/live")


def test_what_takes_longer_than_the_drain_is_told_so(gaussian: Path, served: Served) -> None:
    begun = threading.Event()
    with (
        gateway(gaussian, served, drain_s=0) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        open_one = pool.submit(follow, client, LONG, begun)
        assert begun.wait(60)
        ending = stopping(running)
        name, value = open_one.result(60)[-1]
        assert (
            name == "error"
            and value["error"]["code"] == "unavailable"
            and "stops" in value["error"]["message"]
        )
        ending.join(60)
        assert not ending.is_alive()


def test_a_restart_of_the_server_loses_no_request(gaussian: Path, served: Served, tmp_path: Path) -> None:
    body = {**LONG, "num_samples": 24, "seed": 6, "preview_every": 250}
    before, begun = served.told("ready:"), threading.Event()
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=120) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        resent = counted(client, "volcast_gateway_resent_total")
        under_way = pool.submit(follow, client, body, begun)
        assert begun.wait(60)
        served.signal("bin/tritonserver", signal.SIGKILL)
        # One that comes while no server is there waits for it.
        late = pool.submit(client.post, GENERATE, json={"seed": 2, "steps": 3})
        told = under_way.result(120)
        served.wait("ready:", before + 1)
        assert counted(client, "volcast_gateway_resent_total") > resent
        assert [name for name, _ in told].count("end") == 1 and told[-1][0] == "end"
        volumes = {value["sample"]: value["url"] for name, value in told if name == "volume"}
        assert len(volumes) == 24 == sum(name == "volume" for name, _ in told)
        for sample in range(24):
            steps = [
                value["step"] for name, value in told if name == "progress" and value["sample"] == sample
            ]
            assert steps == sorted(set(steps)) and steps[-1] == 1000
        # All are fetched, so that the end of the gateway does not wait for it.
        contents = [client.get(volumes[sample]).content for sample in range(24)]
        assert late.result(120).status_code == 200, late.result().text
        contents = [contents[0], late.result().content]
    with load(gaussian, engine="onnxruntime", threads=1) as model:
        expected = [model.sample(6, steps=1000, size=(16, 16, 16)), model.sample(2, steps=3)]
    for content, alone in zip(contents, expected, strict=True):
        (tmp_path / "out.nii.gz").write_bytes(content)
        np.testing.assert_array_equal(read_nifti(tmp_path / "out.nii.gz").array, alone.array)


def test_tls_by_configuration(gaussian: Path, served: Served, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]  # fmt: skip
    subprocess.run(make, check=True, capture_output=True)
    listening = Listening(port=0, certificate=certificate, private_key=key)
    trust = ssl.create_default_context(cafile=str(certificate))
    with gateway(gaussian, served, listening=listening) as running:
        assert running.url.startswith("https://")
        with httpx.Client(base_url=running.url, timeout=60, verify=trust) as client:
            assert client.post(GENERATE, json={"steps": 2}).status_code == 200
        with httpx.Client(base_url=running.url, timeout=60) as client, pytest.raises(httpx.ConnectError):
            client.get("/health/live")
    with (
        pytest.raises(ValueError, match="TLS: cannot read"),
        gateway(
            gaussian, served, listening=Listening(port=0, certificate=tmp_path / "none", private_key=key)
        ),
    ):
        pass


class Collector(BaseHTTPRequestHandler):
    """Takes OTLP over HTTP."""

    spans: ClassVar[list[Span]] = []

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            content = gzip.decompress(content)
        for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
            self.spans.extend(span for scope in resource.scope_spans for span in scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_every_request_is_a_span(gaussian: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing_from_environment() is None
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with (
            gateway(gaussian, served, tracing=tracing_from_environment()) as running,
            httpx.Client(base_url=running.url, timeout=60) as client,
        ):
            parent = {"traceparent": f"00-{'a1' * 16}-{'b2' * 8}-01", "x-request-id": "mine"}
            assert client.post(GENERATE, json={"steps": 3, "seed": 9}, headers=parent).status_code == 200
            assert client.post(GENERATE, json={"steps": 0}).status_code == 400
        server.shutdown()  # the gateway has sent all before it ended
    done, refused = sorted(Collector.spans, key=lambda span: span.start_time_unix_nano)
    assert done.name == "POST /v1/models/{model}/generate" and done.trace_id.hex() == "a1" * 16
    assert done.parent_span_id.hex() == "b2" * 8 and done.end_time_unix_nano > done.start_time_unix_nano
    told = {one.key: one.value for one in done.attributes}
    assert told["volcast.request_id"].string_value == "mine" and told["volcast.seed"].string_value == "9"
    assert told["volcast.steps"].int_value == 3 and told["volcast.volumes"].int_value == 1
    assert told["http.response.status_code"].int_value == 200 and not done.status.code
    assert refused.status.code == Status.STATUS_CODE_ERROR and refused.status.message == "invalid"


def test_a_gateway_of_its_own_before_a_server(gaussian: Path, served: Served) -> None:
    command = [sys.executable, "-m", "volcast", "serve", str(gaussian), "--server", f"127.0.0.1:{served.grpc}",
               "--metrics-port", str(served.metrics), "--port", "0"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = process.stderr.readline().rpartition(" ")[2].strip()
            with httpx.Client(base_url=url, timeout=60) as client:
                answer = client.post(GENERATE, json={"steps": 2}, headers={"x-request-id": "mine"})
                assert answer.status_code == 200 and counted(client, "volcast_gateway_triton_metrics_up") == 1
                process.terminate()
                line = json.loads(process.stderr.readline())
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert (line["request_id"], line["status"], line["steps"], line["volumes"]) == ("mine", 200, 2, 1)


def test_answers_wait_for_no_acknowledgement(gaussian: Path, served: Served) -> None:
    with gateway(gaussian, served) as running, httpx.Client(base_url=running.url, timeout=60) as client:
        assert client.get("/health/live").status_code == 200  # and its connection stays open
        (one,) = running._server.server_state.connections
        opened = one.transport.get_extra_info("socket")
        assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_a_port_in_use_is_named(gaussian: Path, served: Served) -> None:
    with (
        pytest.raises(ValueError, match=f"127.0.0.1:{served.port}.*in use.*choose another --port"),
        gateway(gaussian, served, listening=Listening(port=served.port)),
    ):
        pass
