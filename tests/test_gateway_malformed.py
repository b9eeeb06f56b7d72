"""Whatever is sent: no crash, no hang, no error without an id, and the next good request has its bits.

VOLCAST_MALFORMED=10000 sends that many, other ones each time.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gateways import EVENTS, GENERATE, events, gateway
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import Served

from volcast.runtime.volume import Volume
from volcast.triton_repo.gateway import connection
from volcast.triton_repo.gateway.server import Gateway
from volcast.triton_repo.gateway.settings import Limits

MANY = int(os.environ.get("VOLCAST_MALFORMED", "0"))
SETTINGS = settings(
    max_examples=MANY or 200, deadline=None, derandomize=not MANY, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
LIMITS = Limits(rate=1e6, body_bytes=2**16, file_bytes=2**17, voxels=8 * 12 * 8, previews=8)
GOOD: dict[str, Any] = {"seed": 5, "steps": 4, "condition": {"anterior": 0.25}}
NAMES = ["seed", "num_samples", "steps", "scheduler", "guidance", "size", "priority", "deadline_s", "progress_every",
         "preview_every", "condition", "context", "anterior", "output_format", "image", "strength", "region", "negative",
         "inpaint", "mask", "resamples", "paste", "", "\ud800"]  # fmt: skip

numbers = st.one_of(
    st.integers(-2, 70), st.integers(), st.floats(), st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1, 2**64, -1, 1e308, 1e-320])
)  # fmt: skip
scalars = st.one_of(
    numbers, st.none(), st.booleans(), st.text(max_size=20), st.sampled_from(["ddim", "pndm", "0", "\ud800"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
near = st.builds(
    lambda more: {**GOOD, **more}, st.dictionaries(st.sampled_from(NAMES), values, min_size=1, max_size=3)
)
texts = st.one_of(near, near, st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), values, max_size=5), values).map(
    lambda value: json.dumps(value).encode()
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """`whole` with a few pieces cut, doubled, replaced or blown up."""
    content = draw(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 8)))
        piece = draw(st.one_of(
            st.binary(max_size=6), st.just(content[start:end] * 2),
            st.sampled_from([b"[", b"{", b'"', b"\\", b"9", b"\x00", b"\r\n", b":", b"\xc3"]).flatmap(
                lambda one: st.sampled_from([1, 100, 10_000]).map(lambda count: one * count)),
        ))  # fmt: skip
        content = content[:start] + piece + content[end:]
    return content


bodies = st.one_of(texts, texts, mutated(texts), st.binary(max_size=64))
NUMBERS = np.arange(8 * 12 * 8, dtype=np.float32).reshape(8, 12, 8)
IMAGE, MASK = (
    Volume(array, np.diag([1, 1.5, 2, 1]), (1, 1.5, 2)).nifti()
    for array in (NUMBERS, (NUMBERS < 400).astype(np.float32))
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A request with an image (or a mask of one), bytes of which are changed: mostly in its header, before or after it is
    compressed."""
    paints = draw(st.booleans())
    content = bytearray(MASK if paints else IMAGE)
    zipped, late = draw(st.booleans()), draw(st.booleans())
    for last in (False, True):
        content = bytearray(gzip.compress(content)) if last and zipped else content
        for _ in range(draw(st.integers(0, 2)) if last == late else 0):
            place = draw(st.integers(0, 360) | st.integers(0, len(content) - 1))
            content[place : place + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    broken, whole = (base64.b64encode(one).decode() for one in (content, IMAGE))
    given: dict[str, Any] = {"seed": 5, "steps": 4, "strength": 0.5, "image": broken}
    if paints:
        given |= {
            "image": whole,
            "inpaint": {"mask": broken, **draw(st.dictionaries(st.sampled_from(NAMES), values, max_size=1))},
        }
    return json.dumps({**given, **draw(st.dictionaries(st.sampled_from(NAMES), values, max_size=1))}).encode()


bodies = st.one_of(bodies, files())
accepts = st.sampled_from(
    ["*/*", "text/event-stream", "application/gzip", "application/json", "", ";;,,", "text/*;q=0"]
)
requests = st.builds(
    lambda line, headers, body: line + b"\r\n" + b"".join(headers) + b"\r\n" + body,
    st.sampled_from([b"POST " + GENERATE.encode() + b" HTTP/1.1", b"GET /v1/models HTTP/1.1", b"GET /health/live HTTP/1.0",
                     b"GET /page/..%2f..%2fcli.py HTTP/1.1", b"GET /v1/volumes/%00 HTTP/1.1", b"PRI * HTTP/2.0", b"OPTIONS * HTTP/1.1"]),
    st.lists(st.sampled_from([
        b"Host: localhost\r\n", b"Content-Type: application/json\r\n", b"Content-Length: 2\r\n", b"Content-Length: 1000\r\n",
        b"Content-Length: " + b"9" * 20 + b"\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip\r\n", b"Expect: 100-continue\r\n", b"X-Request-Id: \xff\r\n", b"A: " + b"a" * 20_000 + b"\r\n",
        b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Accept: text/event-stream\r\n", b"Host: [\r\n",
    ]), max_size=5),
    st.sampled_from([b"", b"{}", b"2\r\n{}\r\n0\r\n\r\n", b"ffffffffffffffffff\r\n", b"1\r\n{\r\n" * 500, b"\x16\x03\x01\x02\x00"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def opened(gaussian: Path, served: Served) -> Iterator[Gateway]:
    """It must give the same volume before and after all that is sent."""
    with (
        gateway(gaussian, served, limits=LIMITS) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        before = client.post(GENERATE, json=GOOD)
        assert before.status_code == 200
        restarts = served.told("restarting")
        yield running
        after = client.post(GENERATE, json=GOOD)
        assert gzip.decompress(after.content) == gzip.decompress(before.content)
        assert served.told("restarting") == restarts


@pytest.fixture(scope="module")
def client(opened: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=opened.url, timeout=60) as one:
        yield one


@SETTINGS
@given(content=bodies, accept=accepts)
def test_a_body_is_answered_or_refused_by_name(client: httpx.Client, content: bytes, accept: str) -> None:
    headers = {"content-type": "application/json", "accept": accept}
    with client.stream("POST", GENERATE, content=content, headers=headers) as answer:
        if answer.status_code == 200 and accept == EVENTS["accept"]:
            name, value = list(events(answer))[-1]
            assert name in ("end", "error")
            error = value.get("error", {"code": "", "message": ""})
            # What the gateway lets through may only end because of its own deadline.
            assert name == "end" or "deadline" in error["message"], error
            return
        answer.read()
    assert answer.status_code in (200, 400, 413) or "deadline" in answer.text, answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["code"] in ("invalid", "too_large", "unavailable") and "\n" not in error["message"]
        assert error["request_id"] == answer.headers["x-request-id"] and len(error["message"]) < 1000


@SETTINGS
@given(content=st.one_of(requests, mutated(requests), st.binary(min_size=1, max_size=200)))
def test_bytes_on_the_port_are_answered_or_cut_off(opened: Gateway, content: bytes) -> None:
    with socket.create_connection(("127.0.0.1", opened.port), timeout=60) as one:
        told = b""
        try:
            one.sendall(content)
            one.shutdown(socket.SHUT_WR)
            while part := one.recv(65536):
                told += part
        except (ConnectionResetError, BrokenPipeError):
            pass  # refused before all of it was sent
    first = told.partition(b"\r\n")[0]
    assert not first or first.startswith(b"HTTP/1.1 ")
    assert not first.startswith(b"HTTP/1.1 5") or b"x-request-id" in told


def test_a_head_that_never_ends_is_cut_off(opened: Gateway, client: httpx.Client) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "HEAD_S", 0.2)
        sockets = [socket.create_connection(("127.0.0.1", opened.port), timeout=60) for _ in range(20)]
        for one in sockets:
            one.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-A: b")
        for one in sockets:
            assert one.recv(100) == b""  # a timeout would raise
            one.close()
    assert client.get("/health/live").status_code == 200
