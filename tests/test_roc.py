"""The area under the ROC curve and its interval: against scipy, and DeLong's closed form of its deviation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from volcast.runtime.roc import auc, roc


def test_the_area_is_mann_and_whitney_s() -> None:
    generator = np.random.default_rng(0)
    above, below = (
        generator.normal(0.7, 1, 37).round(1),
        generator.normal(0, 1, 23).round(1),
    )  # rounded: with ties
    wanted = mannwhitneyu(above, below).statistic / (37 * 23)
    assert roc(above, below).auc == pytest.approx(wanted, rel=1e-12) == auc(above, below)


def test_the_interval_is_as_wide_as_delong_says() -> None:
    generator = np.random.default_rng(1)
    above, below = generator.normal(1, 1, 200), generator.normal(0, 1, 150)
    found = roc(above, below)
    wins = (above[:, None] > below) + 0.0
    variance = wins.mean(1).var(ddof=1) / 200 + wins.mean(0).var(ddof=1) / 150  # DeLong et al. 1988
    wide = 2 * 1.96 * np.sqrt(variance)
    # Either percentile of 2000 resamples is off by some 3.7 % of the half width (sqrt(.025 .975 / 2000) / density / 1.96).
    assert (found.high - found.low) / wide == pytest.approx(1, abs=0.12)
    assert found.low < found.auc < found.high
    assert roc(above, below) == found


def test_the_ends() -> None:
    assert (
        auc([3, 2], [1, 0]) == 1
        and auc([0], [1]) == 0
        and auc([1, 1], [1]) == 0.5
        and auc([3, 1], [2, 0]) == 0.75
    )
    assert (roc([3, 2], [1, 0]).low, roc([3, 2], [1, 0]).high) == (1, 1)
    assert roc([0], [0]).auc == roc([0], [0]).low == 0.5
    with pytest.raises(ValueError, match="no score"):
        roc([], [1])
