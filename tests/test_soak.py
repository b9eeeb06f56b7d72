"""A short soak of the real server: mixed requests, some cancelled, some cut off, while model processes are killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from served import Served

from volcast.benchmarks.soak_callers import make_kinds, soak
from volcast.benchmarks.soak_usage import STUB, TRITON, shared_memory, usage
from volcast.runtime.pipeline import load

REQUESTS = 80


def until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


def test_every_request_is_answered_once_or_failed_by_name(served: Served, gaussian: Path) -> None:
    with load(gaussian, engine="onnxruntime", threads=1) as model:
        kinds = make_kinds(model, 12, seed=1)
    before = served.told("ready:")

    def on_done(done: int) -> None:
        if done in (10, 40):
            served.signal(STUB, signal.SIGKILL)

    def run(seed: int, disturb: Callable[[int], object]) -> None:
        outcome = soak(f"127.0.0.1:{served.grpc}", kinds, REQUESTS, concurrency=6, seed=seed, on_done=disturb)
        assert not outcome.wrong
        assert outcome.ended.total() == REQUESTS
        # A fast machine may have answered before a connection is cut.
        assert set(outcome.ended) <= {"answered", "cancelled", "disconnected"}, outcome.ended
        assert outcome.ended["answered"] > REQUESTS / 2

    run(0, on_done)
    assert until(lambda: served.told("ready:") > before)
    pid = served.process.pid
    run(1, lambda _: None)
    held = usage(pid)
    run(2, lambda _: None)

    def let_go() -> bool:
        now = usage(pid)
        # gRPC grows its threads with what comes at once, by a few; a leak would be one a request.
        return all(
            now[name].threads <= held[name].threads + 8
            and now[name].descriptors <= held[name].descriptors + 8
            for name in (STUB, TRITON)
        )

    assert until(let_go), (held, usage(pid))
    # Triton's pool for this model, and nothing of clients or of servers that were killed.
    assert until(lambda: len(shared_memory(pid)) == 1), shared_memory(pid)
