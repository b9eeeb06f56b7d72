"""Statistics of a volume's rows, slab by slab, and what a norm makes of them; `runtime/moments.py` merges them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from volcast.runtime.moments import merged

_BLOCK = 2**24
"""Elements that are widened to float32 at once, where a row is not larger."""


def rows_at_once(shape: Sequence[int]) -> int:
    """How many rows of a value `N C rows ..` are widened together."""
    return max(1, _BLOCK * shape[2] // math.prod(shape))


@final
class RowMoments:
    """Mean and variance (biased) of every row.

    Attributes:
        mean, variance: float64 `[N, C, D]`.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        """`shape`: that of the whole value, `N C D ..`."""
        self.mean = torch.zeros(tuple(shape[:3]), dtype=torch.float64, device=device)
        self.variance = torch.zeros_like(self.mean)

    def add(self, x: Tensor, start: int) -> None:
        """Take rows `start`, .. from `x` `N C rows ..`, float32, float16 or bfloat16."""
        rows, step = x.shape[2], rows_at_once(x.shape)
        for first in range(0, rows, step):
            block = x[:, :, first : first + step].float()
            variance, mean = torch.var_mean(block, tuple(range(3, x.ndim)), correction=0)
            to = slice(start + first, start + first + block.shape[2])
            self.mean[:, :, to] = mean
            self.variance[:, :, to] = variance


def center_and_scale(
    parts: Sequence[RowMoments],  # of values whose channels stand one after the other
    shift: Tensor | None,  # [N, C], [1, C] or [C] of the first part: added to it
    groups: int,
    weight: Tensor,  # [channels of all parts]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`[N, channels]` in float32, so that group_norm(cat(parts)) = (part - center) * scale + bias."""
    means = torch.cat([part.mean for part in parts], 1)
    variances = torch.cat([part.variance for part in parts], 1)
    added = torch.zeros_like(means[..., 0])
    if shift is not None:
        added[:, : shift.shape[-1]] = shift
    means = means + added[..., None]
    mean, variance = merged(means, variances, groups)
    size = weight.shape[0] // groups
    deviation = (variance + eps).sqrt().repeat_interleave(size, 1)
    center = mean.repeat_interleave(size, 1) - added
    return center.float(), (weight.double() / deviation).float()
