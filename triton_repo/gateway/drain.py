"""The end of a gateway: what is open may finish, what comes is sent away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

from .refusal import Refusal

FETCH_S = 5.0
"""For callers whose volumes are done to fetch them, after the last request."""


@final
class Drain:
    """For one event loop."""

    def __init__(self) -> None:
        self.open = 0
        self.draining = self.hurried = False

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around one request. Raises `Refusal` once the gateway drains."""
        if self.draining:
            raise Refusal("unavailable", "[gateway] the server stops; ask again", 5.0)
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    async def wait(self, seconds: float, waiting: Callable[[], int]) -> bool:
        """Take no more requests; whether those that are open end within `seconds`, and what is `waiting` is fetched."""
        self.draining = True
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while self.open and clock() < end and not self.hurried:
            await asyncio.sleep(0.05)
        done = not self.open
        end = min(end, clock() + FETCH_S)
        while done and waiting() and clock() < end and not self.hurried:
            await asyncio.sleep(0.05)
        return done
