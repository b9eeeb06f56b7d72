"""The transformer run over sequences: token by token when sampling, in blocks when the tokens are known."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from .engine import Arrays
from .programs import Programs
from .token_choice import Choice, draw, probabilities, uniforms
from .token_spec import TokenSpec

Indices = NDArray[np.int64]
LARGEST_BLOCK = 256
"""Known tokens of one call: more need memory for the scores, and fewer more calls."""


@final
@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Tokens int64 `[N, L]` in the order of the sequence, the logits `[N, L, T]` they came from where they were kept,

    and the seconds within the network.
    """

    tokens: Indices
    logits: NDArray[np.float32] | None
    network_seconds: float


@final
class TokenSequence:
    """A batch of sequences under way: the cache of keys and values, allocated once and written in place.

    `cross`: what the step takes of the conditions (`prepare`), for every sequence of the batch.
    """

    def __init__(self, spec: TokenSpec, programs: Programs, batch: int, cross: Arrays) -> None:
        self._spec = spec
        self._programs = programs
        self._batch = batch
        self._feed = dict(cross)
        self.network_seconds = 0.0
        shapes = {tensor.name: tensor.shape for tensor in spec.programs["step"].inputs}
        self._keys, self._values = (
            np.zeros((spec.layers, batch, *map(int, shapes[f"{name}_0"][1:])), np.float32)
            for name in ("keys", "values")
        )
        for layer in range(spec.layers):
            self._feed |= {f"keys_{layer}": self._keys[layer], f"values_{layer}": self._values[layer]}

    def advance(self, tokens: Indices, position: int) -> NDArray[np.float32]:
        """Logits float32 `[N, B, tokens]` after each of the next tokens `[N, B]`, the first of them at `position`."""
        last = position + tokens.shape[1]
        self._feed |= {"tokens": tokens, "positions": np.arange(position, last)}
        step = self._programs.open("step", {name: value.shape for name, value in self._feed.items()})
        began = time.perf_counter()
        found = step(self._feed)
        self.network_seconds += time.perf_counter() - began
        self._keys[..., position:last] = found["keys"]
        self._values[..., position:last, :] = found["values"]
        logits = np.asarray(found["logits"], np.float32)
        if not np.isfinite(logits).all():
            raise ValueError(
                f"[sample] the logits at token {position} are not finite; check the weights, or export with fp32 weights"
            )
        return logits


def draw_sequences(
    sequence: TokenSequence, spec: TokenSpec, seed: int, samples: Sequence[int], choice: Choice,
    on_token: Callable[[int, int], None], keep_logits: bool = False,
) -> Drawn:  # fmt: skip
    """One sequence for each of `samples`. Token t of a sample is decided by (seed, sample, t) alone.

    `on_token(done, total)` follows each token, and what it raises ends the run.
    """
    tokens = np.empty((len(samples), spec.length), np.int64)
    last = np.full((len(samples), 1), spec.bos_token, np.int64)
    kept: list[NDArray[np.float32]] = []
    for position in range(spec.length):
        logits = sequence.advance(last, position)
        kept += [logits] if keep_logits else []
        p = probabilities(logits[:, 0, : spec.num_codes], choice)
        last = draw(p, uniforms(seed, samples, position))[:, None]
        tokens[:, position] = last[:, 0]
        on_token(position + 1, spec.length)
    every = np.concatenate(kept, axis=1) if kept else None
    return Drawn(tokens=tokens, logits=every, network_seconds=sequence.network_seconds)


def block_size(spec: TokenSpec) -> int:
    """Known tokens of one call: as many as divide the sequence, so that one shape does for all."""
    return max(size for size in range(1, LARGEST_BLOCK + 1) if spec.length % size == 0)


def log_likelihoods(sequence: TokenSequence, spec: TokenSpec, tokens: Indices) -> NDArray[np.float64]:
    """log p (natural) of every token `[N, L]` given those before it, over all tokens that the transformer knows."""
    begin = np.full((len(tokens), 1), spec.bos_token, np.int64)
    known = np.concatenate((begin, tokens[:, :-1]), axis=1)
    block = block_size(spec)
    found = np.empty(tokens.shape, np.float64)
    for first in range(0, spec.length, block):
        part = slice(first, first + block)
        logits = sequence.advance(np.ascontiguousarray(known[:, part]), first).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, tokens[:, part, None], -1)[..., 0]
        found[:, part] = chosen - np.log(np.exp(logits).sum(axis=-1))
    return found
