"""Callers who do not read what they asked for: neither memory nor a place is theirs for ever."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from gateways import GENERATE, counted, gateway, until
from served import Served

from volcast.triton_repo.gateway import connection, download
from volcast.triton_repo.gateway.keys import NOBODY
from volcast.triton_repo.gateway.server import Gateway
from volcast.triton_repo.gateway.settings import Limits, Timing

CONTENT = np.random.default_rng(0).bytes(2**22)
KERNEL = 4096
"""For the sockets' buffers; Linux takes twice as much, and no less than some kilobytes."""


@contextmanager
def asked(running: Gateway, head: str, body: bytes = b"") -> Iterator[socket.socket]:
    """A connection on which a request has been sent, and nothing is read."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL)
        one.settimeout(60)
        one.connect(("127.0.0.1", running.port))
        one.sendall(f"{head} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
                    f"Content-Type: application/json\r\n\r\n".encode() + body)  # fmt: skip
        yield one


def kept(running: Gateway) -> str:
    """The path of a volume that the gateway keeps."""
    running._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL)  # of connections that come
    store = running._application.store
    return f"/v1/volumes/{store.put(CONTENT, owner=NOBODY, filename='f.nii.gz', preview=False)}"


def paused(running: Gateway) -> list[int]:
    """Bytes that wait on each connection whose reader is behind."""
    known = list(running._server.server_state.connections)
    return [one.transport.get_write_buffer_size() for one in known if one.flow.write_paused]


def test_a_reader_who_is_behind_gets_all_and_holds_little(gaussian: Path, served: Served) -> None:
    with gateway(gaussian, served) as running, asked(running, f"GET {kept(running)}") as one:
        (waiting,) = until(lambda: paused(running))
        assert waiting < 2**18  # AHEAD, what went beyond it, and not 4 MiB
        told = b""
        while b"\r\n\r\n" not in told or len(told.partition(b"\r\n\r\n")[2]) < len(CONTENT):
            told += one.recv(2**16)
        head, _, body = told.partition(b"\r\n\r\n")
        assert body == CONTENT and f"content-length: {len(CONTENT)}".encode() in head.lower()


def test_a_reader_who_does_not_read_is_cut_off(
    gaussian: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_S", 0.5)
    aborted = []
    lost = connection.Connection.connection_lost
    monkeypatch.setattr(
        connection.Connection, "connection_lost", lambda self, exc: (aborted.append(self), lost(self, exc))
    )
    with gateway(gaussian, served) as running, asked(running, f"GET {kept(running)}") as one:
        until(lambda: aborted)
        told = b""
        with suppress(ConnectionResetError):
            while part := one.recv(2**16):
                told += part
        assert len(told) < len(CONTENT) / 2  # what the kernel held
        until(lambda: not paused(running))
        with httpx.Client(base_url=running.url, timeout=60) as client:
            assert client.get("/health/live").status_code == 200


def test_an_answer_that_nobody_reads_gives_its_place_back(
    gaussian: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "AHEAD", 2**8)
    monkeypatch.setattr(download, "PIECE", 2**8)
    monkeypatch.setattr(download, "SLOWEST", 1e9)
    limits, timing = Limits(rate=1e6, concurrency=1), Timing(stall_s=3)
    body = json.dumps({"steps": 1, "size": [16, 16, 16]}).encode()  # 130 kB, which are noise
    with (
        gateway(gaussian, served, limits=limits, timing=timing) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        kept(running)
        with asked(running, f"POST {GENERATE}", body):
            until(lambda: counted(client, 'volcast_gateway_generations_total{outcome="cancelled"}') == 1)
            assert client.post(GENERATE, json={"steps": 1}).status_code == 200
