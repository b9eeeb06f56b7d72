"""Intervals of confidence of statistics of sets of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]

REPLICATES = 200
LEVEL = 0.95


def half_sample_interval(
    statistic: Callable[..., float], sizes: Sequence[int], value: float, generator: np.random.Generator
) -> tuple[float, float] | None:
    """The `LEVEL` interval of a statistic whose value on all images is `value`; None where one is infinite or no number.

    `statistic` takes rows of each set, of `sizes` images. A half-sample bootstrap, each replicate of half of every set
    drawn without replacement (the delete-half jackknife, Shao and Wu 1989): a mean varies over halves as it does over
    data sets, and no image meets itself, as it would drawn twice, which distances and pairs would take for likeness.
    What a smaller set shifts (a Fréchet distance, upwards) is taken off: the replicates' mean is moved to `value`.
    """
    found = np.array(
        [statistic(*(generator.permutation(size)[: size // 2] for size in sizes)) for _ in range(REPLICATES)]
    )
    if not (np.isfinite(found).all() and np.isfinite(value)):
        return None
    smallest = min(sizes)
    half = smallest // 2
    # Of an odd number, half is a little less than half: var = s^2 / half (1 - half / n), where s^2 / n is wanted.
    deviations = (found - found.mean()) * np.sqrt(half / (smallest - half))
    low, high = value + np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
