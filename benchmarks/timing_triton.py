"""GPU time of a call inside a CUDA graph, so that launches from Python cost nothing: as an engine runs it."""

from __future__ import annotations

from collections.abc import Callable

import triton.testing

from .bench import Statistics, summarize


def gpu_ms(functions: list[Callable[[], object]], rounds: int) -> list[Statistics]:
    """Milliseconds of each call; the functions take turns for `rounds` rounds, each with graphs of its own."""
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, times in zip(functions, taken, strict=True):
            times.append(float(triton.testing.do_bench_cudagraph(function, rep=50, return_mode="median")))
    return [summarize(times) for times in taken]
