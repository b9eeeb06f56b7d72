"""Temperature, top-k and top-p against their definitions in Python's own floats, and the draw by Philox."""

from __future__ import annotations

import math

import numpy as np
import pytest

from volcast import _core
from volcast.runtime.token_choice import Choice, draw, probabilities, uniforms


def defined(logits: list[float], choice: Choice) -> list[float]:
    """The definition, code by code: sort, cut, normalise."""
    ranked = sorted(range(len(logits)), key=lambda code: (-logits[code], code))
    if choice.top_k is not None:
        least = logits[ranked[choice.top_k - 1]]
        ranked = [code for code in ranked if logits[code] >= least]
    weights = {code: math.exp((logits[code] - logits[ranked[0]]) / choice.temperature) for code in ranked}
    total = math.fsum(weights.values())
    kept: list[int] = []
    while ranked and (
        choice.top_p is None or math.fsum(weights[code] / total for code in kept) < choice.top_p
    ):
        kept.append(ranked.pop(0))
    total = math.fsum(weights[code] for code in kept)
    return [weights[code] / total if code in kept else 0.0 for code in range(len(logits))]


@pytest.mark.parametrize(
    "choice",
    [
        Choice(),
        Choice(temperature=0.3),
        Choice(temperature=4.0, top_k=5),
        Choice(top_k=1),
        Choice(top_k=20),
        Choice(top_p=0.5),
        Choice(top_p=1e-9),
        Choice(top_p=1.0),
        Choice(temperature=2.0, top_k=7, top_p=0.8),
    ],
)
def test_probabilities_are_as_defined(choice: Choice) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (50, 20))
    logits[0, 3:6] = logits[0].max()  # ties at the top: top-k keeps all of them
    logits[1] = 0.0
    logits[1, 0] = 0.1  # else top_p=0.5 lies on the sum of ten codes, where rounding decides
    found = probabilities(logits, choice)
    want = np.array([defined(list(row), choice) for row in logits])
    # 20 additions in float64.
    np.testing.assert_allclose(found, want, rtol=0, atol=20 * 2.0**-52)
    np.testing.assert_array_equal(found > 0, want > 0)


def test_extreme_logits() -> None:
    found = probabilities(np.array([[1e30, -1e30, 0.0], [-5e3, -5e3, -6e3]]), Choice(temperature=1e-3))
    np.testing.assert_array_equal(found, [[1, 0, 0], [0.5, 0.5, 0]])


def test_draw_inverts_the_cumulated_probabilities() -> None:
    p = np.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = (np.arange(1000) + 0.5) / 1000
    found = draw(np.repeat(p[None], 1000, 0), u)
    np.testing.assert_array_equal(np.bincount(found, minlength=6), 1000 * p)
    ends = np.array([2.0**-33, 1 - 2.0**-33])
    np.testing.assert_array_equal(draw(np.repeat(p[None], 2, 0), ends), [1, 4])


def test_uniforms_are_the_words_of_philox() -> None:
    seed, samples, token = 2**63 + 5, [0, 3, 2**40], 17
    key = [seed & 0xFFFFFFFF, seed >> 32]
    words = [_core.philox([0, token, s & 0xFFFFFFFF, s >> 32], key)[0] for s in samples]
    found = uniforms(seed, samples, token)
    np.testing.assert_array_equal(found, [(word + 0.5) / 2**32 for word in words])
    np.testing.assert_array_equal(uniforms(seed, [3], token), found[1:2])
