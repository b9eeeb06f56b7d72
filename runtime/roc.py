"""The area under the ROC curve of scores, with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


@final
@dataclass(frozen=True, kw_only=True)
class Roc:
    """The chance `auc` that an image of the first set scores above one of the second, and its 95 % interval."""

    auc: float
    low: float
    high: float


def auc(above: Sequence[float], below: Sequence[float]) -> float:
    """The chance that a score of `above` exceeds one of `below`, ties half: Mann and Whitney's U over the pairs."""
    return float(_wins(above, below).mean())


def roc(above: Sequence[float], below: Sequence[float]) -> Roc:
    """`auc`, and the 2.5th and 97.5th percentile of it over 2000 resamples of either set, the same ones every time.

    With one image in each set the interval has no width.
    """
    wins = _wins(above, below)
    first, second = wins.shape
    generator = np.random.default_rng(0)
    rows = generator.multinomial(first, np.full(first, 1 / first), RESAMPLES)
    columns = generator.multinomial(second, np.full(second, 1 / second), RESAMPLES)
    found = ((rows @ wins) * columns).sum(1) / wins.size
    low, high = np.percentile(found, (2.5, 97.5))
    return Roc(auc=float(wins.mean()), low=float(low), high=float(high))


def _wins(above: Sequence[float], below: Sequence[float]) -> NDArray[np.float64]:
    """`[above, below]`: 1 where the first score is higher, a half where they are equal."""
    if not len(above) or not len(below):
        raise ValueError("[roc] a set holds no score: need one or more in each")
    difference = np.subtract.outer(np.asarray(above, np.float64), np.asarray(below, np.float64))
    return np.asarray((difference > 0) + 0.5 * (difference == 0))
