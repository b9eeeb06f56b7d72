"""The noise of a request, for whoever compares volcast with another sampler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from volcast import _core


def request_noise(seed: int, samples: range, step: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normals `[N, *shape]` as `Model.sample` draws them (Philox 4x32-10) for the samples of a request.

    `step` 0 is the initial noise; i + 1 is what row i of a stochastic plan (DDPM, DDIM with eta) adds.
    """
    seeds = np.full(len(samples), seed, np.uint64)
    drawn = _core.normal(
        seeds, np.asarray(samples, dtype=np.uint64), step, tuple(shape), np.dtype(np.float32)
    )
    return drawn.astype(np.float32, copy=False)
