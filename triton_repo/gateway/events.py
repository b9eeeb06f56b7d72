"""Answers that outlast a caller's patience: an event stream with signs of life, and what to do when the caller goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar, final

from starlette.types import Receive, Send

from .refusal import Refusal, as_json

T = TypeVar("T")
ALIVE = b": keep-alive\n\n"


def event(name: str, value: Any) -> bytes:
    """One server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html); JSON has no line breaks."""
    return b"event: " + name.encode() + b"\ndata: " + as_json(value) + b"\n\n"


async def disconnected(receive: Receive) -> None:
    """Returns when the caller has gone; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


@final
class EventStream:
    """Sends events as they come. `keep_alive_s`: between signs of life. `stall_s`: that a reader may take for one event."""

    def __init__(self, *, keep_alive_s: float, stall_s: float) -> None:
        self._keep_alive_s, self._stall_s = keep_alive_s, stall_s

    async def send(self, events: AsyncGenerator[bytes, None], receive: Receive, send: Send) -> None:
        """Raises `Refusal` (cancelled): the caller went away, or does not read. `events` is closed in every case."""
        headers = [
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        gone = asyncio.ensure_future(disconnected(receive))
        coming: asyncio.Task[bytes | None] | None = None
        async with aclosing(events):
            try:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                while True:
                    coming = coming or asyncio.ensure_future(_next(events))
                    await asyncio.wait(
                        {coming, gone}, timeout=self._keep_alive_s, return_when="FIRST_COMPLETED"
                    )
                    if gone.done():
                        raise Refusal("cancelled", "[gateway] the caller went away")
                    chunk: bytes | None = ALIVE
                    if coming.done():
                        chunk, coming = coming.result(), None
                    if chunk is None:
                        break
                    await self._write(send, chunk)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                for task in (gone, coming):
                    if task is not None:
                        task.cancel()
                        with suppress(asyncio.CancelledError, Exception):
                            await task

    async def _write(self, send: Send, chunk: bytes) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TimeoutError:
            raise Refusal("cancelled", f"[gateway] the caller read nothing for {self._stall_s:g} s") from None


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """What `work` gives. Raises `Refusal` (cancelled), and cancels it, when the caller goes first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when="FIRST_COMPLETED")
        if not task.done():
            raise Refusal("cancelled", "[gateway] the caller went away")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def _next(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)
