"""How alike two volumes are. Each number is NaN if either volume holds one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from monai.metrics.regression import MultiScaleSSIMMetric, PSNRMetric, SSIMMetric
from numpy.typing import NDArray

Array = NDArray[np.generic]

# Wang, Simoncelli, Bovik 2003: exponents of the five scales, finest first.
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_KERNEL = 7
_SIGMA = 1.5


def relative_l2(found: Array, wanted: Array) -> float:
    """|found - wanted| / |wanted| in float64; infinity where the shapes differ or only `wanted` is zero."""
    if found.shape != wanted.shape:
        return math.inf
    size = float(np.linalg.norm(wanted.astype(np.float64)))
    difference = float(np.linalg.norm(found.astype(np.float64) - wanted.astype(np.float64)))
    if size == 0:
        return math.inf if difference > 0 else difference
    return difference / size


def psnr(found: Array, wanted: Array, peak: float | None = None) -> float:
    """MONAI's PSNRMetric in dB, the mean over samples; infinity for equal volumes. The peak is `wanted`'s range if None."""
    if found.shape != wanted.shape:
        return math.nan
    peak = _range(wanted) if peak is None else peak
    if np.array_equal(found, wanted):
        return math.inf
    if not peak > 0:
        return math.nan
    metric: Any = PSNRMetric(max_val=peak)
    return float(metric(*_tensors(found, wanted)).mean())


def ssim(found: Array, wanted: Array, peak: float | None = None) -> float:
    """MONAI's SSIMMetric at the finest of `ms_ssim`'s scales, with its kernel; the mean over samples."""
    if found.shape != wanted.shape:
        return math.nan
    kernel, _ = _settings("ssim", wanted)
    metric: Any = SSIMMetric(
        spatial_dims=wanted.ndim - 2,
        data_range=_range(wanted) if peak is None else peak,
        win_size=kernel,
        kernel_sigma=_SIGMA,
    )
    return float(metric(*_tensors(found, wanted)).mean())


def ms_ssim(found: Array, wanted: Array, peak: float | None = None) -> float:
    """MONAI's MultiScaleSSIMMetric of `[N, C, D, H, W]` or `[N, C, H, W]`, the mean over samples; 1 is equal.

    MONAI's own kernel of 11 and five scales need 176 voxels an axis. Here the Gaussian (sigma 1.5) is 7 wide, which
    holds 98 % of it an axis, or as wide as the volume; scales are as many of the five as the smallest axis allows
    (`scales`), with the paper's exponents of those scales, scaled to sum to one. 32 x 48 x 32 gets three. `peak` is
    the data range, `wanted`'s if None.

    Raises ValueError for an axis of one voxel, which MONAI's metric cannot halve.
    """
    if found.shape != wanted.shape:
        return math.nan
    kernel, count = _settings("ms_ssim", wanted)
    weights = [weight / sum(_WEIGHTS[:count]) for weight in _WEIGHTS[:count]]
    metric: Any = MultiScaleSSIMMetric(
        spatial_dims=wanted.ndim - 2,
        data_range=_range(wanted) if peak is None else peak,
        kernel_size=kernel,
        kernel_sigma=_SIGMA,
        weights=weights,
    )
    return float(metric(*_tensors(found, wanted)).mean())


def _settings(name: str, wanted: Array) -> tuple[int, int]:
    if min(wanted.shape[2:]) < 2:
        raise ValueError(f"[{name}] got {wanted.shape}: need 2 voxels an axis or more; compare by psnr")
    return scales(min(wanted.shape[2:]))


def _range(wanted: Array) -> float:
    return float(wanted.max()) - float(wanted.min())


def _tensors(*volumes: Array) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(each, np.float32)) for each in volumes]


def scales(smallest: int) -> tuple[int, int]:
    """Width of the kernel and number of scales that MONAI's metric takes for a smallest axis of this size."""
    kernel = min(_KERNEL, smallest)
    count = 1
    while count < len(_WEIGHTS) and smallest // count**2 >= kernel and smallest >> count >= kernel:
        count += 1
    return kernel, count
