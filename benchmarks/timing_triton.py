"""GPU time of a call inside a CUDA graph, so that launches from Python cost nothing: as an engine runs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.testing
from triton.errors import TritonError

from .bench import Statistics, summarize


def gpu_ms(functions: list[Callable[[], object]], rounds: int) -> list[Statistics]:
    """Milliseconds of each call; the functions take turns for `rounds` rounds, each with graphs of its own.

    Raises ValueError for a call that the GPU has no room for.
    """
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, times in zip(functions, taken, strict=True):
            try:
                times.append(float(triton.testing.do_bench_cudagraph(function, rep=50, return_mode="median")))
            except (TritonError, torch.OutOfMemoryError) as error:
                raise ValueError(f"[bench] {type(error).__name__}: {error}") from error
    return [summarize(times) for times in taken]
