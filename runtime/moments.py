"""Group statistics from those of rows, which were taken slab by slab.

Every row (a plane of a volume, a line of an image) has its mean and variance taken about its own mean, in float32;
they are merged in float64 and in the order of the rows, whatever the slabs were. All rows and channels have as many
voxels, so the pairwise update of Chan, Golub, LeVeque (1983) is in closed form

    mean = E[mean_r]        variance = E[variance_r] + E[(mean_r - mean)^2]

which loses nothing where the mean is far larger than the deviation.
"""

from __future__ import annotations

from typing import Any


def merged(means: Any, variances: Any, groups: int) -> tuple[Any, Any]:
    """Mean and variance `[N, groups]` of rows' `[N, C, rows]`, arrays of NumPy or PyTorch."""
    grouped, within = (x.reshape(len(x), groups, -1) for x in (means, variances))
    mean = grouped.mean(-1)
    return mean, within.mean(-1) + ((grouped - mean[..., None]) ** 2).mean(-1)
