"""How much each caller may ask for at a time: a token bucket and a number of open requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

from .refusal import Refusal


@dataclass(kw_only=True)
class _Caller:
    tokens: float
    seen: float
    open: int = 0


@final
class Quotas:
    """For one thread. Callers are the names of keys, so that there are never many."""

    def __init__(self, rate: float, concurrency: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`rate`: requests a second in the long run, and twice that many (at least one) at once."""
        self._rate, self._burst, self._concurrency, self._clock = rate, max(1.0, 2 * rate), concurrency, clock
        self._callers: dict[str, _Caller] = {}

    @contextmanager
    def one(self, caller: str) -> Iterator[None]:
        """Around one request. Raises `Refusal` (rate_limited), with the seconds until there is room."""
        now = self._clock()
        known = self._callers.setdefault(caller, _Caller(tokens=self._burst, seen=now))
        known.tokens = min(self._burst, known.tokens + (now - known.seen) * self._rate)
        known.seen = now
        if known.open >= self._concurrency:
            raise Refusal(
                "rate_limited",
                f"[gateway] {known.open} requests of this key are open; wait for one of them",
                1.0,
            )
        if known.tokens < 1:
            wait = (1 - known.tokens) / self._rate
            raise Refusal(
                "rate_limited",
                f"[gateway] more than {self._rate:g} requests a second; retry in {wait:.1f} s",
                wait,
            )
        known.tokens -= 1
        known.open += 1
        try:
            yield
        finally:
            known.open -= 1


@final
class Budget:
    """Bytes that all requests together may hold. For one thread."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0

    @contextmanager
    def request(self) -> Iterator[Callable[[int], None]]:
        """Around one request: what is called with the bytes that it holds from now on, and raises `Refusal`: unavailable
        where others leave no room for them, too_large where there never is."""
        mine = 0

        def hold(size: int) -> None:
            nonlocal mine
            if size > self._most:
                raise Refusal("too_large", f"[request] it takes {_mib(size)} MiB with its images: this server holds {_mib(self._most)} MiB (--held-mib); send smaller ones")  # fmt: skip
            if self._held - mine + size > self._most:
                raise Refusal(
                    "unavailable", "[gateway] other requests' images fill the memory; retry in 1 s", 1.0
                )
            self._held += size - mine
            mine = size

        try:
            yield hold
        finally:
            self._held -= mine


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
