"""Mean and variance of samples, voxel by voxel: what an ensemble agrees on, and where it does not."""

from __future__ import annotations

from typing import final

import numpy as np
from numpy.typing import NDArray

from .volume import Volume


@final
class Ensemble:
    """Volumes are added one by one and none is kept: Welford's update (1962) in float64, two arrays of a volume's size.

    Attributes:
        count: volumes added so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._first: Volume | None = None
        self._mean: NDArray[np.float64] = np.zeros(())
        self._squares: NDArray[np.float64] = np.zeros(())

    def add(self, volume: Volume) -> None:
        """ValueError: of another shape, or in another place, than the first."""
        first = self._first
        if first is None:
            self._first = first = volume
            self._mean, self._squares = np.zeros(volume.array.shape), np.zeros(volume.array.shape)
        if volume.array.shape != first.array.shape or (volume.affine != first.affine).any():
            raise ValueError(
                f"[ensemble] a volume {volume.array.shape} among volumes {first.array.shape}, or in another place: add "
                "samples of one request"
            )
        self.count += 1
        off = volume.array - self._mean
        self._mean += off / self.count
        self._squares += off * (volume.array - self._mean)

    def mean(self) -> Volume:
        """Of the volumes added (ValueError: none), in float32 where they lie."""
        return self._map(self._mean, 1)

    def variance(self) -> Volume:
        """The unbiased one, by n - 1, in squared units of the image (ValueError: fewer than 2 volumes)."""
        return self._map(self._squares / max(self.count - 1, 1), 2)

    def _map(self, values: NDArray[np.float64], least: int) -> Volume:
        if self._first is None or self.count < least:
            raise ValueError(f"[ensemble] {self.count} volumes: need {least} or more")
        return Volume(values.astype(np.float32), self._first.affine, self._first.spacing_mm)
