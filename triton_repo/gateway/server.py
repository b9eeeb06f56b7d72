"""The gateway on a port: uvicorn on a thread of its own, from the first connection to the last."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import threading
from typing import final

import uvicorn

from .application import Application
from .connection import Connection
from .keys import Keys
from .settings import Listening

ABORT_S = 2.0
"""For requests that were cut off to tell their callers."""


@final
class Gateway:
    """Serves an application between `start` and `stop`."""

    def __init__(self, listening: Listening, application: Application, *, drain_s: float) -> None:
        """Raises ValueError: the port is in use, a certificate cannot be read."""
        self._application, self._drain_s = application, drain_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket = _listen(listening)
        try:
            config = uvicorn.Config(
                application, log_config=None, access_log=False, server_header=False, proxy_headers=False, http=Connection,
                ws="none", lifespan="on", timeout_keep_alive=15, timeout_graceful_shutdown=5,
                ssl_certfile=listening.certificate, ssl_keyfile=listening.private_key,
            )  # fmt: skip
            config.load()
        except (OSError, ssl.SSLError) as error:
            self._socket.close()
            raise ValueError(f"[gateway] TLS: cannot read the certificate or its key ({error})") from error
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="volcast gateway")
        scheme = "http" if listening.certificate is None else "https"
        host = f"[{listening.host}]" if ":" in listening.host else listening.host
        self.port: int = self._socket.getsockname()[1]
        self.url = f"{scheme}://{host}:{self.port}"

    def start(self) -> None:
        """Returns when it answers. Raises ValueError: it does not; the lines above say why."""
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.01)
            if not self._thread.is_alive():
                raise ValueError("[gateway] it did not start; see the lines above")

    def stop(self) -> None:
        """Refuse what comes; give what is open its time; end. Safe to call twice, from any thread but its own."""
        if self._loop is not None and self._thread.is_alive() and not self._server.should_exit:
            asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result()
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()

    def hurry(self) -> None:
        """Cut the patience of a `stop` under way short."""
        self._application.drain.hurried = True

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._socket])

    async def _drain(self) -> None:
        drain = self._application.drain
        if not await drain.wait(self._drain_s, self._application.store.waiting):
            await self._application.upstream.close()
            await drain.wait(ABORT_S, lambda: 0)


def check_exposure(listening: Listening, keys: Keys) -> None:
    """ValueError: others could reach the gateway, and nothing keeps them out; or half of what TLS needs."""
    if (listening.certificate is None) != (listening.private_key is None):
        raise ValueError("[gateway] TLS needs both: give --tls-cert and --tls-key")
    if not (is_loopback(listening.host) or keys or listening.insecure):
        raise ValueError(f"[gateway] host={listening.host} without keys: anyone who reaches it could use it; give --keys, or --insecure")  # fmt: skip


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(listening: Listening) -> socket.socket:
    family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
    # asyncio sends at once (TCP_NODELAY) only where the protocol is named: else answers wait 40 ms for an acknowledgement.
    one = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind((listening.host, listening.port))
        one.listen(2048)
    except (OSError, OverflowError) as error:
        one.close()
        raise ValueError(
            f"[gateway] {listening.host}:{listening.port}: {error}; choose another --port or --host"
        ) from error
    return one
