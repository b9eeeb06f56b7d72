"""What stands before every route: the request's id, who asks, the log line, the last word on errors."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any, final

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .keys import Keys
from .log import LOGGER
from .metrics import Metrics
from .refusal import INTERNAL, STATUS, Refusal, as_json
from .tracing import Tracing

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self'"
)
_HEADERS = {
    "content-security-policy": _POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
}  # fmt: skip


@final
class Front:
    """An ASGI application around another one."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        metrics: Metrics,
        hosts: frozenset[str] | None,
        tracing: Tracing | None,
    ) -> None:
        """`hosts`: names by which a gateway without keys may be asked, or a page of someone else's could ask it through
        a name of its own; None: any."""
        self._app, self._keys, self._metrics, self._hosts, self._tracing = app, keys, metrics, hosts, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex
        state["log"] = {}
        began, began_ns, status = time.perf_counter(), time.time_ns(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                for name, value in {**_HEADERS, "x-request-id": state["request_id"]}.items():
                    MutableHeaders(scope=message)[name] = value
            await send(message)

        refusal: Refusal | None = None
        raised: HTTPException | None = None
        try:
            self._check_host(headers)
            if scope["path"].startswith("/v1"):
                state["caller"] = self._keys.caller(headers.get("authorization"))
            await self._app(scope, receive, answer)
        except Refusal as error:
            refusal = error
        except HTTPException as error:  # what Starlette's routes and files raise
            raised = error
            refusal = Refusal(
                "not_found" if error.status_code == 404 else "invalid", f"[gateway] {error.detail}"
            )
        except Exception:  # noqa: BLE001  (it is logged and answered)
            LOGGER.exception("failed", extra={"fields": {"request_id": state["request_id"]}})
            refusal = Refusal("internal", INTERNAL)
        finally:
            if refusal is not None:
                state["log"]["code"] = refusal.code
                if not status:
                    await _refuse(refusal, state["request_id"], answer, raised)
            gone = refusal is not None and refusal.code == "cancelled"
            self._told(scope, STATUS["cancelled"] if gone else status, time.perf_counter() - began, began_ns)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "").rpartition("@")[2]
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self._hosts is not None and name.lower() not in self._hosts:
            raise Refusal(
                "invalid", "[gateway] Host: without keys only this machine's own names are answered"
            )

    def _told(self, scope: Scope, status: int, seconds: float, began_ns: int) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route=route, status=str(status)).inc()
        self._metrics.seconds.labels(route=route).observe(seconds)
        fields: dict[str, Any] = {
            "request_id": scope["state"]["request_id"], "method": scope["method"][:16], "path": scope["path"][:200],
            "status": status, "seconds": round(seconds, 4), "key": scope["state"].get("caller"),
            **scope["state"]["log"],
        }  # fmt: skip
        if self._tracing is not None:
            self._tracing.record(Headers(scope=scope), route, began_ns, fields)
        quiet = route.startswith(("/health", "/metrics", "/page")) and status < 400
        LOGGER.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


async def _refuse(refusal: Refusal, request_id: str, send: Send, raised: HTTPException | None) -> None:
    content = as_json(refusal.body(request_id))
    headers = {"content-type": "application/json", "content-length": str(len(content)), **refusal.headers()}
    status = STATUS[refusal.code]
    if raised is not None:
        headers, status = {**headers, **(raised.headers or {})}, raised.status_code
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
