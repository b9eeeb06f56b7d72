"""uvicorn's connection, with a limit on how long the head of a request may take."""

from __future__ import annotations

import asyncio
from typing import Any, final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 20.0


@final
class Connection(H11Protocol):
    """uvicorn closes idle connections between requests; here also one whose request never gets whole."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        whole = self.conn.their_state is not h11.IDLE
        if self._late is None and not whole:
            self._late = self.loop.call_later(HEAD_S, self.transport.close)
        elif self._late is not None and whole:
            self._late.cancel()
            self._late = None
