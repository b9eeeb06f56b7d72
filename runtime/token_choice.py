"""Which token comes next: temperature, top-k and top-p (nucleus) over the logits, in float64, and a draw by Philox."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, final

import numpy as np
from numpy.typing import NDArray

from volcast import _core


class ChoiceSettings(TypedDict, total=False):
    """The fields of `Choice` as keyword arguments."""

    temperature: float
    top_k: int | None
    top_p: float | None


@final
@dataclass(frozen=True, kw_only=True)
class Choice:
    """How tokens are drawn.

    Attributes:
        temperature: above 0; the logits are divided by it.
        top_k: only the k most probable codes (and those as probable as the k-th) may be drawn; None: all.
        top_p: of these, only the fewest most probable ones whose probabilities sum to at least p (Holtzman et al. 2020,
            "The curious case of neural text degeneration"), 0 < p <= 1; None: all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self, codes: int) -> None:
        """Raises ValueError: a number out of range for a codebook of so many codes."""
        if not (0 < self.temperature < math.inf):
            greedy = "; for the most probable token each time give top_k=1" if self.temperature == 0 else ""
            raise ValueError(f"[sample] temperature={self.temperature}: need a number above 0{greedy}")
        if self.top_k is not None and not (type(self.top_k) is int and 1 <= self.top_k <= codes):
            raise ValueError(
                f"[sample] top_k={self.top_k}: need 1..{codes}, the model's codes; leave it out for all"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"[sample] top_p={self.top_p}: need above 0, at most 1; leave it out for all")


def make_choice(settings: ChoiceSettings) -> Choice:
    """ValueError: an unknown setting. Numbers are checked by `Choice.check`."""
    known = ChoiceSettings.__annotations__
    unknown = ", ".join(settings.keys() - known.keys())
    if unknown:
        raise ValueError(f"[sample] unknown setting {unknown}; known: {', '.join(known)}")
    return Choice(**settings)


def probabilities(logits: NDArray[np.floating], choice: Choice) -> NDArray[np.float64]:
    """float64 `[N, codes]`, rows that sum to 1, from logits `[N, codes]` of the codes alone.

    The order is temperature, top-k, top-p. MONAI takes its top k among all tokens and strikes the begin token out
    afterwards, which leaves k - 1 codes, or none, where that token is among them; here it never counts.
    """
    z: NDArray[np.float64] = np.asarray(logits, np.float64) / choice.temperature
    if choice.top_k is not None and choice.top_k < z.shape[1]:
        least = np.partition(z, -choice.top_k, axis=1)[:, -choice.top_k, None]
        z = np.where(z < least, -np.inf, z)
    p: NDArray[np.float64] = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    if choice.top_p is not None and choice.top_p < 1:
        order = np.argsort(-p, axis=1, kind="stable")
        ranked = np.take_along_axis(p, order, 1)
        before = np.cumsum(ranked, axis=1) - ranked
        kept = np.zeros(p.shape, bool)
        np.put_along_axis(kept, order, before < choice.top_p, 1)
        kept[np.arange(len(p)), order[:, 0]] = True
        p = np.where(kept, p, 0.0)
        p /= p.sum(axis=1, keepdims=True)
    return p


def draw(p: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.int64]:
    """int64 `[N]`: of each row of probabilities the first code whose cumulated probability exceeds u `[N]`, 0 < u < 1.

    A code of probability 0 is never drawn.
    """
    cumulated = np.cumsum(p, axis=1)
    first: NDArray[np.int64] = np.argmax(cumulated > u[:, None] * cumulated[:, -1:], axis=1)
    return first


def uniforms(seed: int, samples: Sequence[int], token: int) -> NDArray[np.float64]:
    """float64 `[N]` in (0, 1): what decides token number `token` of each of these samples, whatever else is drawn.

    Two Box-Muller normals of one Philox block have radius sqrt(-2 log u): u = exp(-(a^2 + b^2) / 2) gives back the word
    (r + 1/2) / 2^32 that they were made of. Rounding it to that grid makes it exact, on every machine.
    """
    seeds = np.full(len(samples), seed, np.uint64)
    normals = _core.normal(seeds, np.asarray(samples, np.uint64), token, (2,), np.dtype(np.float64))
    u = np.exp(-np.square(normals).sum(axis=1) / 2)
    exact: NDArray[np.float64] = (np.round(u * 2.0**32 - 0.5) + 0.5) / 2.0**32
    return exact
