"""The gateway as an ASGI application: its routes and what they share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from volcast.runtime.spec import Manifest

from .body import BodyReader
from .describe import model_entry, openapi
from .download import Download
from .drain import Drain
from .front import Front
from .generate import Generate
from .health import Readiness
from .keys import Keys
from .metrics import CONTENT_TYPE, Metrics
from .quota import Quotas
from .refusal import Refusal, as_json
from .schema import body_schema
from .settings import Limits, Timing
from .store import VolumeStore
from .tracing import Tracing
from .upstream import Upstream

PAGE = Path(__file__).parent.parent / "page"
OPEN, DEFAULT, TIMING = Keys(), Limits(), Timing()
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})


@final
class Application:
    """One artifact, served by the Triton at `grpc` as the model `name`.

    Attributes:
        drain, store: for who ends it.
    """

    def __init__(
        self, spec: Manifest, name: str, *, grpc: str, triton_metrics: str | None, keys: Keys = OPEN,
        limits: Limits = DEFAULT, timing: Timing = TIMING, hosts: frozenset[str] | None = LOOPBACK,
        tracing: Tracing | None = None,
    ) -> None:  # fmt: skip
        """`grpc`, `triton_metrics`: hosts and ports; `hosts`: as `Front` takes them."""
        self.drain, self.store = Drain(), VolumeStore(limits.store_bytes, limits.store_s)
        self.metrics = Metrics(triton_metrics, lambda: self.drain.open, lambda: self.store.bytes)
        self.upstream = Upstream(grpc, name, patience_s=timing.patience_s, on_resend=self.metrics.resent.inc)
        self._readiness = Readiness(spec, self.upstream, timing.ready_s, lambda: self.metrics.served(name))
        schema = body_schema(spec)
        self._documents = {
            "/v1/models": as_json({"models": [model_entry(spec, name, limits)]}),
            "/openapi.json": as_json(openapi(spec, name, schema, limits, bool(keys))),
        }
        self._generate = Generate(
            name, BodyReader(spec, schema, limits), self.upstream, self.store, Quotas(limits.rate, limits.concurrency),
            self.drain, self.metrics, self._readiness, limits, timing,
        )  # fmt: skip
        page = StaticFiles(directory=PAGE, check_dir=False)
        router = Router(
            [
                Route("/", self._index),
                Mount("/page", page, name="page"),
                *(Route(path, self._document) for path in self._documents),
                Route("/v1/models/{model}/generate", self._generate, methods=["POST"]),
                Route("/v1/volumes/{id}", self._volume),
                Route("/health/live", self._live),
                Route("/health/ready", self._ready),
                Route("/metrics", self._metrics_text),
            ],
            redirect_slashes=False,
            lifespan=self._lifespan,
        )
        self._page, self._stall_s = page, timing.stall_s
        self._front, self._tracing = Front(router, keys, self.metrics, hosts, tracing), tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Routes raise what is not found, for `Front` to tell, if they know of an application.
        await self._front({**scope, "app": self}, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.upstream.close()
            self._generate.close()
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)

    async def _index(self, request: Request) -> Response:
        return await self._page.get_response("index.html", request.scope)

    async def _document(self, request: Request) -> Response:
        return _json(self._documents[request.url.path])

    async def _volume(self, request: Request) -> Download:
        one = self.store.get(request.path_params["id"], request.state.caller)
        if one is None:
            raise Refusal(
                "not_found",
                "[gateway] no such volume, or it was kept long enough; generate it again with its seed",
            )
        one.fetched = True
        return Download(one.content, one.filename, {}, stall_s=self._stall_s)

    async def _live(self, _: Request) -> Response:
        return _json(as_json({"status": "live"}))

    async def _ready(self, _: Request) -> Response:
        fault = "[gateway] the server stops" if self.drain.draining else await self._readiness.fault()
        self.metrics.ready.set(fault is None)
        if fault is not None:
            raise Refusal("unavailable", fault, 5.0)
        return _json(as_json({"status": "ready"}))

    async def _metrics_text(self, _: Request) -> Response:
        return Response(await self.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
