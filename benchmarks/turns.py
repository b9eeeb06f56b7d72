"""How soon does a server turn to somebody else? After a cancel, and from a long request to a short one.

    python -m volcast.benchmarks.turns [ARTIFACT] [--repeats 100] [-o results/serving.jsonl]

Cancel: with one place to take turns, a long request is cancelled at a random moment while another waits. From the cancel to
the end of the other's first step, less one step, is what the place took to become free; messages both ways count. Short:
the time of a short request behind a long one, over its time alone, in turns.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
import typer

from volcast.runtime.artifact import read_artifact
from volcast.runtime.client_async import AsyncClient
from volcast.runtime.default_artifact import default_artifact
from volcast.runtime.engine_auto import physical_cores, resolve_engine
from volcast.runtime.engine_name import EngineName

from .bench import environment, paired_ratios, summarize
from .load_report import percentiles
from .report import append
from .server import start_server

LONG = 1000
"""Steps of a request that does not end by itself."""
SEEN = 6
"""Steps after which it is cancelled, and of the other."""


@final
class Steps:
    """When a request's steps were heard of, in seconds of `time.perf_counter`."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.done: list[int] = []
        self._news = asyncio.Event()

    def __call__(self, done: int, total: int) -> None:
        self.times.append(time.perf_counter())
        self.done.append(done)
        self._news.set()

    def step_s(self) -> float:
        """Seconds a step, from the first message to the last: a message may stand for several steps."""
        return (self.times[-1] - self.times[0]) / (self.done[-1] - self.done[0])

    async def wait(self, count: int) -> None:
        """Until `count` messages have come."""
        while len(self.times) < count:
            self._news.clear()
            await self._news.wait()


async def cancels(client: AsyncClient, repeats: int, rng: np.random.Generator) -> dict[str, Any]:
    """Milliseconds and steps until the place of a cancelled request is another's, of a server with one place."""
    waited, steps = [], []
    for _ in range(repeats):
        long, other = Steps(), Steps()
        holder = asyncio.ensure_future(client.sample(1, steps=LONG, on_step=long))
        await long.wait(SEEN)
        waiter = asyncio.ensure_future(client.sample(1, steps=SEEN, on_step=other))
        await asyncio.sleep(0.05 + rng.uniform(0, long.step_s()))  # it is in the queue by then
        began = time.perf_counter()
        holder.cancel()
        await asyncio.wait([holder, waiter])
        waited.append((other.times[0] - began, other.done[0]))
        steps.append(long.step_s())
    step = float(
        np.median(steps)
    )  # one for all: messages of a single request come in bundles on a busy machine
    freed = [seconds - done * step for seconds, done in waited]
    return {
        "ms": percentiles([1e3 * one for one in freed]),
        "steps": percentiles([one / step for one in freed]),
        "step_ms": summarize([1e3 * one for one in steps]).as_dict(),
    }


async def shorts(client: AsyncClient, repeats: int, short: int, long: int) -> dict[str, Any]:
    """Seconds of a request of `short` steps alone and behind one of `long`, and their ratio."""

    async def timed() -> float:
        began = time.perf_counter()
        await client.sample(1, steps=short)
        return time.perf_counter() - began

    alone, behind = [], []
    for _ in range(repeats):
        alone.append(await timed())
        heard = Steps()
        other = asyncio.ensure_future(client.sample(2, steps=long, on_step=heard))
        await heard.wait(2)
        behind.append(await timed())
        other.cancel()
        await asyncio.wait([other])
        await asyncio.sleep(0.1)  # it has left
    return {
        "short": short, "long": long, "alone_s": summarize(alone).as_dict(), "behind_s": summarize(behind).as_dict(),
        "ratio": paired_ratios(behind, alone).as_dict(),
    }  # fmt: skip


def main(
    artifact: Annotated[Path | None, typer.Argument(help="Left out: the bundled model.")] = None,
    engine: Annotated[EngineName, typer.Option(help="What runs the networks.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    repeats: Annotated[int, typer.Option(min=1, max=10000, help="Cancels; a tenth as many short requests.")] = 100,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append the result to this file, as a JSON line.")
    ] = None,
) -> None:  # fmt: skip
    """Measure both on servers of this command's own; prints one JSON line."""
    engine, threads = resolve_engine(engine, threads)
    line: dict[str, Any] = {
        "benchmark": "turns", "artifact": read_artifact(artifact or default_artifact()).name, "engine": engine,
        "environment": environment(threads or physical_cores()),
    }  # fmt: skip

    async def measure(address: str, name: str) -> dict[str, Any]:
        async with AsyncClient(address) as client:
            await client.sample(1, steps=2)
            if name == "cancel":
                return await cancels(client, repeats, np.random.default_rng(0))
            return await shorts(client, max(1, repeats // 10), 5, 50)

    for name, active in (("cancel", 1), ("short", 8)):
        with start_server(artifact, engine, threads, active=active, queue=8) as server:
            line[name] = asyncio.run(measure(server.grpc, name))
    line["load_after"] = environment(1)["load"]
    print(json.dumps(line))
    if output is not None:
        append(output, line)


if __name__ == "__main__":
    typer.run(main)
