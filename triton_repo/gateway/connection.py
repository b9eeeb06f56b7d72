"""uvicorn's connection, with limits on how long the head of a request may take, and a caller who does not read."""

from __future__ import annotations

import asyncio
from typing import Any, final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 20.0
AHEAD = 2**16
"""Bytes that may wait for a reader before the next ones are asked for."""
STALL_S = 60.0
"""For a reader to take what waits for it."""


@final
class Connection(H11Protocol):
    """uvicorn closes idle connections between requests; here also one whose request never gets whole, and one on which
    an answer waits: asyncio would wait for ever until the last byte of it has left."""

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(AHEAD)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._late, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None and not self.transport.is_closing():
            self._unread.cancel()
            self._unread = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_later()

    def _abort_later(self) -> None:
        if self._unread is None:
            self._unread = self.loop.call_later(STALL_S, self.transport.abort)

    def _watch(self) -> None:
        whole = self.conn.their_state is not h11.IDLE
        if self._late is None and not whole:
            self._late = self.loop.call_later(HEAD_S, self.transport.close)
        elif self._late is not None and whole:
            self._late.cancel()
            self._late = None
