"""The model behind the gateway: one stream of answers a request, sent again when the server under it is replaced."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import CancelledError
from contextlib import aclosing
from typing import final

from volcast.runtime.client_async import AsyncClient
from volcast.runtime.exchange import Unavailable, retry_s
from volcast.runtime.interface import Array

from .refusal import Refusal

LOST = 4
"""How many servers a request may lose after they began to answer: one that ends them must not be sent for ever."""
_OWN = re.compile(r"\[(request|sample|condition|negative|inpaint|repaint)\] ")
_STOPS = "[gateway] the server stops; ask again"


@final
class Upstream:
    """Belongs to one event loop. Every answer to a request comes from its seed, so that sending it again changes
    nothing but time."""

    def __init__(
        self, address: str, model: str, *, patience_s: float, on_resend: Callable[[], None] = lambda: None
    ) -> None:
        """`address`: host and port of Triton's gRPC. `patience_s`: for how long a server may be away."""
        self._client = AsyncClient(address, model)
        self._patience_s, self._on_resend = patience_s, on_resend
        self._stopped = asyncio.Event()

    async def close(self) -> None:
        """End every request under way: each raises `Refusal`."""
        self._stopped.set()
        await self._client.close()

    async def answers(
        self, tensors: Mapping[str, Array], *, resend: bool = True
    ) -> AsyncGenerator[dict[str, Array], None]:
        """What the model sends, as it comes. Closing the generator cancels the request at the server.

        When a server is replaced the request begins again and so do its answers; `resend` False: it fails instead.
        Raises `Refusal`.
        """
        since: float | None = None
        lost, pause = 0, 0.1
        while True:
            answered = False
            try:
                async with aclosing(self._once(tensors)) as once:
                    async for answer in once:
                        yield answer
                        since, pause, answered = None, 0.1, True
                return
            except Unavailable as error:
                # Who was taken before is not sent away because others were quicker at the new server.
                full = retry_s(error) is not None
                if not resend or self._stopped.is_set() or (full and since is None):
                    raise _refusal(error) from error
                since = time.monotonic() if since is None else since
                # Without an answer it is patience that ends it: a server that starts refuses many times.
                lost += answered
                if lost > LOST or time.monotonic() + pause > since + self._patience_s:
                    raise _refusal(error) from error
            self._on_resend()
            await self._wait(pause)
            pause = min(1.0, 2 * pause)

    async def _once(self, tensors: Mapping[str, Array]) -> AsyncGenerator[dict[str, Array], None]:
        if self._stopped.is_set():
            raise Refusal("unavailable", _STOPS, 5.0)
        try:
            async with aclosing(self._client.answers(tensors)) as answers:
                async for answer in answers:
                    yield answer
        except (ValueError, TimeoutError, CancelledError) as error:
            stops = self._stopped.is_set()
            raise (Refusal("unavailable", _STOPS, 5.0) if stops else _refusal(error)) from error
        except asyncio.CancelledError:
            # gRPC's way to say that its channel was closed; else this task is the one that is cancelled.
            task = asyncio.current_task()
            if self._stopped.is_set() and task is not None and not task.cancelling():
                raise Refusal("unavailable", _STOPS, 5.0) from None
            raise

    async def _wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return
        raise Refusal("unavailable", _STOPS, 5.0)


def _refusal(error: Exception) -> Refusal:
    text = str(error)
    if isinstance(error, Unavailable):
        hint = retry_s(error)
        return Refusal("unavailable", f"[gateway] the server is away ({text}); ask again", 5.0) if hint is None else Refusal("unavailable", text, hint)  # fmt: skip
    if "deadline cannot be met" in text:
        return Refusal("unavailable", text, 1.0)
    if isinstance(error, CancelledError):
        return Refusal("cancelled", text)
    return Refusal("invalid" if _OWN.match(text) else "internal", text)
