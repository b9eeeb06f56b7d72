"""Group statistics of a volume that is seen slab by slab.

Every row (a plane of a volume, a line of an image) has its mean and variance taken about its own mean, in float32;
they are merged in float64 and in the order of the rows, whatever the slabs were. All rows and channels have as many
voxels, so the pairwise update of Chan, Golub, LeVeque (1983) is in closed form

    mean = E[mean_r]        variance = E[variance_r] + E[(mean_r - mean)^2]

which loses nothing where the mean is far larger than the deviation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

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
    grouped, within = (m.reshape(len(m), groups, -1) for m in (means, variances))
    mean = grouped.mean(-1, keepdim=True)
    variance = within.mean(-1) + (grouped - mean).square().mean(-1)
    size = weight.shape[0] // groups
    deviation = (variance + eps).sqrt().repeat_interleave(size, 1)
    center = mean[..., 0].repeat_interleave(size, 1) - added
    return center.float(), (weight.double() / deviation).float()
