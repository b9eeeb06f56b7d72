"""A file as an answer, no faster into memory than its reader takes it out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import final

from starlette.types import Receive, Scope, Send

from .refusal import Refusal

PIECE = 2**16
"""Bytes handed to the connection at a time: what it holds besides are 64 KiB more."""
SLOWEST = 2**16
"""Bytes a second that a reader has to take on average."""


@final
class Download:
    """A `.nii.gz`, as an ASGI application. `stall_s`: seconds besides those that `SLOWEST` gives."""

    def __init__(self, content: bytes, filename: str, headers: Mapping[str, str], *, stall_s: float) -> None:
        self._content, self._patience_s = content, stall_s + len(content) / SLOWEST
        told = {
            "content-type": "application/gzip", "content-length": str(len(content)), "cache-control": "no-store",
            "content-disposition": f'attachment; filename="{filename}"', **headers,
        }  # fmt: skip
        self._headers = [(name.encode(), value.encode()) for name, value in told.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises `Refusal` (cancelled): the reader is too slow; the connection is not fit for another answer."""
        whole = memoryview(self._content)
        try:
            async with asyncio.timeout(self._patience_s):
                await send({"type": "http.response.start", "status": 200, "headers": self._headers})
                for first in range(0, len(whole), PIECE):
                    piece = bytes(whole[first : first + PIECE])
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            raise Refusal(
                "cancelled",
                f"[gateway] the caller took more than {self._patience_s:.0f} s to read the answer",
            ) from None
