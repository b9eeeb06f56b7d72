"""Healing: the tokens of an image that a transformer finds unlikely, replaced by those that it expects.

MONAI's tutorial anomaly_detection_with_transformers, after Pinaya et al. 2022 (arXiv:2102.11650); with the cache of keys
and values a token is computed once, not with all before it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from .token_sequence import Indices, TokenSequence, block_size
from .token_spec import TokenSpec

Mask = NDArray[np.bool_]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Healed:
    """Attributes:
    tokens: int64 `[*token_shape]`, the codes with the unlikely ones replaced.
    masked: bool, of the same shape: which were unlikely.
    image: float32 `[C, D, H, W]`, decoded from `tokens`.
    difference: float32, as image: |given - image| where masked, each token on its block of voxels, else 0.
    """

    tokens: Indices
    masked: Mask
    image: NDArray[np.float32]
    difference: NDArray[np.float32]


def unlikely(log_p: NDArray[np.float64], quantile: float) -> Mask:
    """Which log-likelihoods lie below their own quantile (ValueError: not between 0 and 1)."""
    if not 0 < quantile < 1:
        raise ValueError(f"[heal] quantile={quantile}: need above 0 and below 1")
    return np.asarray(log_p < np.quantile(log_p, quantile))


def heal_tokens(sequence: TokenSequence, spec: TokenSpec, tokens: Indices, masked: Mask) -> Indices:
    """Tokens int64 `[L]` in the order of the sequence, each masked one the likeliest given the healed ones before it."""
    healed = tokens.copy()
    block, position = block_size(spec), 0
    while position < spec.length and masked[position:].any():
        # Within a block every token has to be known before; the last one's successor need not.
        ahead = masked[position : position + block - 1]
        size = block if position + block <= spec.length and not ahead.any() else 1
        before = healed[position - 1 : position + size - 1] if position else healed[: size - 1]
        known = before if position else np.concatenate(([spec.bos_token], before))
        logits = sequence.advance(np.ascontiguousarray(known[None]), position)
        position += size
        if masked[position - 1]:
            healed[position - 1] = int(np.argmax(logits[0, -1, : spec.num_codes]))
    return healed


def masked_difference(
    given: NDArray[np.float32], image: NDArray[np.float32], masked: Mask
) -> NDArray[np.float32]:
    """|given - image| `[C, D, H, W]` where a token `[*token_shape]` is masked, each on its block of voxels."""
    voxels = masked
    for axis, size in enumerate(image.shape[1:]):
        voxels = np.repeat(voxels, size // voxels.shape[axis], axis=axis)
    return np.where(voxels, np.abs(given - image), np.float32(0))
