"""Fréchet distance of two sets of volumes on fixed features: no network, no weights, nothing to download.

A voxel's features are its value, its slope along each axis (central differences) and its curvature (the sum of second
differences), on the volume as it is and on means over blocks of 2 and of 4 voxels an axis. They see brightness,
contrast, edges and noise at three scales, but no anatomy. The distance is that of Gaussians fitted to the features
(Heusel et al., arXiv:1706.08500, Eq. 6), every inner voxel of every volume being an observation, in units of the second
set's standard deviations and averaged over the scales. It does not compare with distances on Inception's features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

SCALES = (1, 2, 4)
"""Voxels an axis that are averaged."""
SMALLEST = 4
"""Voxels an axis that a scale must leave: two inner ones."""

Array = NDArray[np.float64]


@final
@dataclass(frozen=True, kw_only=True)
class FeatureMoments:
    """Of the features of `N` images at every scale: observations `[N]`, means `[N, F]` and covariances `[N, F, F]`.

    An image's channels count as more of its voxels.
    """

    counts: tuple[Array, ...]
    means: tuple[Array, ...]
    covariances: tuple[Array, ...]

    def of(self, rows: NDArray[np.intp]) -> FeatureMoments:
        """Those of the images `rows` alone."""
        return FeatureMoments(
            counts=tuple(each[rows] for each in self.counts),
            means=tuple(each[rows] for each in self.means),
            covariances=tuple(each[rows] for each in self.covariances),
        )

    def pooled(self) -> list[tuple[Array, Array]]:
        """By scale, the mean `[F]` and the covariance `[F, F]` of all images' features at once."""
        return [_pooled(*each) for each in zip(self.counts, self.means, self.covariances, strict=True)]


def feature_moments(images: Iterable[NDArray[np.generic]], shape: Sequence[int]) -> FeatureMoments:
    """Of images `[C, D, H, W]` or `[C, H, W]` of the spatial `shape`, one in memory at a time.

    Raises:
        ValueError: an axis of fewer than 4 voxels, which has no inner ones.
    """
    if min(shape) < SMALLEST:
        raise ValueError(f"[frechet] got {tuple(shape)}: need {SMALLEST} voxels an axis or more")
    scales = [scale for scale in SCALES if min(shape) // scale >= SMALLEST]
    found = [[_image_moments(image, scale) for scale in scales] for image in images]
    counts, means, covariances = (
        tuple(np.stack([each[scale][part] for each in found]) for scale in range(len(scales)))
        for part in range(3)
    )
    return FeatureMoments(counts=counts, means=means, covariances=covariances)


def frechet(found: NDArray[np.generic], wanted: NDArray[np.generic]) -> float:
    """The distance of the volumes `found` from `wanted`, `[N, C, D, H, W]` or `[N, C, H, W]`; 0: the same moments.

    Channels are volumes of their own. NaN if a volume holds one.

    Raises:
        ValueError: an axis of fewer than 4 voxels, which has no inner ones.
    """
    return frechet_of_moments(*(feature_moments(each, wanted.shape[2:]) for each in (found, wanted)))


def frechet_of_moments(found: FeatureMoments, wanted: FeatureMoments) -> float:
    """As `frechet`, of the images' moments."""
    distances = []
    for (mean_a, covariance_a), (mean_b, covariance_b) in zip(found.pooled(), wanted.pooled(), strict=True):
        deviation = np.sqrt(np.diag(covariance_b))
        # What never varies in `wanted` has no unit of its own.
        unit = np.where(deviation > 0, deviation, 1)
        both = np.outer(unit, unit)
        distances.append(
            frechet_distance(mean_a / unit, covariance_a / both, mean_b / unit, covariance_b / both)
        )
    return float(np.mean(distances))


def _image_moments(image: NDArray[np.generic], scale: int) -> tuple[Array, Array, Array]:
    parts = [features(volume, scale) for volume in image]
    each = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return np.asarray(float(len(each))), each.mean(axis=0), np.cov(each, rowvar=False)


def _pooled(counts: Array, means: Array, covariances: Array) -> tuple[Array, Array]:
    total = counts.sum()
    mean = counts @ means / total
    apart = means - mean
    spread = np.tensordot(counts - 1, covariances, 1) + (counts[:, None] * apart).T @ apart
    return mean, spread / (total - 1)


def features(volume: NDArray[np.generic], scale: int) -> Array:
    """`[observations, 2 + axes]` of a volume `[D, H, W]` averaged over blocks of `scale` voxels an axis."""
    x = np.asarray(volume, np.float64)
    for axis in range(x.ndim):
        size = x.shape[axis] // scale
        x = np.moveaxis(x, axis, -1)[..., : size * scale]
        x = np.moveaxis(x.reshape(*x.shape[:-1], size, scale).mean(axis=-1), -1, axis)
    axes = range(x.ndim)
    inner = x[tuple(slice(1, -1) for _ in axes)]
    before, after = ([_shifted(x, axis, way) for axis in axes] for way in (-1, 1))
    slopes = [(b - a) / 2 for a, b in zip(before, after, strict=True)]
    curvature = np.sum([a + b - 2 * inner for a, b in zip(before, after, strict=True)], axis=0)
    return np.stack([inner, *slopes, curvature], axis=-1).reshape(-1, 2 + len(slopes))


def frechet_distance(mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array) -> float:
    """|a - b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians.

    The root's trace is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric: nothing
    complex comes up, however singular A and B are.
    """
    if not all(np.isfinite(each).all() for each in (mean_a, covariance_a, mean_b, covariance_b)):
        return float("nan")
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance_b @ root), 0)).sum()
    apart = float(((mean_a - mean_b) ** 2).sum())
    # Of equal Gaussians the rest is 0 but for rounding, which may fall below it.
    return max(0.0, apart + float(np.trace(covariance_a) + np.trace(covariance_b) - 2 * shared))


def _shifted(x: Array, axis: int, way: int) -> Array:
    """The inner voxels' neighbours along `axis`."""
    window = [slice(1, -1) for _ in range(x.ndim)]
    window[axis] = slice(1 + way, x.shape[axis] - 1 + way)
    return x[tuple(window)]
