"""Requests to a server as callers make them: open loop (Poisson arrivals, whatever the server does) and closed loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import final

import numpy as np

from volcast.runtime.client import Unavailable
from volcast.runtime.client_async import AsyncClient
from volcast.runtime.exchange import retry_s


@final
@dataclass(frozen=True, kw_only=True)
class Mix:
    """What is asked for: each request draws one of `steps` and one of `priorities`; `preview_every`: steps, 0 none."""

    steps: tuple[int, ...]
    priorities: tuple[int, ...] = (0,)
    guidance: float | None = None
    preview_every: int = 0


@final
@dataclass(kw_only=True)
class Sent:
    """A request and what came of it; times in seconds from the beginning of its run, None where it did not happen.

    Attributes:
        due: when it was to be sent: times are counted from then, so that a client that is late hides nothing.
        sent: when it was.
        done: steps by the end of the run.
        outcome: "volume", "refused" or "unfinished" (when the run ended), else the error's text.
        retry_s: the wait that a refusal names.
    """

    steps: int
    priority: int
    due: float
    sent: float = 0.0
    done: int = 0
    first_step: float | None = None
    first_preview: float | None = None
    ended: float | None = None
    outcome: str = "unfinished"
    retry_s: float | None = None


@final
@dataclass
class Load:
    """Sends requests to one server, each once. `sent` holds all of them."""

    client: AsyncClient
    mix: Mix
    rng: np.random.Generator
    sent: list[Sent] = field(default_factory=list)

    async def open_loop(self, rate: float, seconds: float) -> None:
        """`rate` requests a second on average for `seconds`, Poisson; what is then under way is cancelled."""
        count = self.rng.poisson(rate * seconds)
        due = np.sort(self.rng.uniform(0, seconds, count))  # Poisson arrivals, given how many there are
        began = time.perf_counter()
        tasks = []
        for at in due:
            await asyncio.sleep(max(0.0, at - (time.perf_counter() - began)))
            tasks.append(asyncio.ensure_future(self._ask(self._draw(float(at)), began)))
        await asyncio.sleep(max(0.0, seconds - (time.perf_counter() - began)))
        await _cancel(tasks)

    async def closed_loop(self, callers: int, seconds: float) -> None:
        """`callers` that each send a request as soon as their last one is answered, for `seconds`."""
        began = time.perf_counter()

        async def call() -> None:
            while True:
                one = self._draw(time.perf_counter() - began)
                await self._ask(one, began)
                await asyncio.sleep(one.retry_s or 0.0)

        tasks = [asyncio.ensure_future(call()) for _ in range(callers)]
        await asyncio.wait(tasks, timeout=seconds)
        await _cancel(tasks)

    def _draw(self, due: float) -> Sent:
        steps, priority = (int(self.rng.choice(values)) for values in (self.mix.steps, self.mix.priorities))
        self.sent.append(Sent(steps=steps, priority=priority, due=due))
        return self.sent[-1]

    async def _ask(self, one: Sent, began: float) -> None:
        def now() -> float:
            return time.perf_counter() - began

        def on_step(done: int, total: int) -> None:
            one.done = done
            one.first_step = now() if one.first_step is None else one.first_step

        def on_preview(done: int, volume: object) -> None:
            one.first_preview = now() if one.first_preview is None else one.first_preview

        every, one.sent = self.mix.preview_every, now()
        try:
            await self.client.sample(
                steps=one.steps, priority=one.priority, guidance=self.mix.guidance, output_format="float16",
                on_step=on_step, on_preview=on_preview if every else None, preview_every=every,
            )  # fmt: skip
            one.outcome = "volume"
        except Unavailable as error:
            one.outcome, one.retry_s = "refused", retry_s(error)
        except (ValueError, TimeoutError, CancelledError) as error:
            one.outcome = str(error)
        one.ended = now()


async def _cancel(tasks: Sequence[asyncio.Future[None]]) -> None:
    for task in tasks:
        task.cancel()
    for found in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(found, BaseException) and not isinstance(found, asyncio.CancelledError):
            raise found
