"""Intensities of volumes: a network's own, and those in which volumes are written and given (CT: Hounsfield units)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .spec import IntensitySpec

Images = NDArray[np.float32]


def written(spec: IntensitySpec | None, images: NDArray[Any]) -> Images:
    """Images with the network's intensities as volumes have them; None: as they are."""
    return _mapped(images, spec.network, spec.written) if spec is not None else np.asarray(images, np.float32)


def of_network(spec: IntensitySpec | None, images: NDArray[Any]) -> Images:
    """The inverse of `written` but for what it clipped."""
    return _mapped(images, spec.written, spec.network) if spec is not None else np.asarray(images, np.float32)


def _mapped(images: NDArray[Any], source: tuple[float, float], target: tuple[float, float]) -> Images:
    """In float32: an image is large. Clipped at last too, so that rounding leaves the range nowhere."""
    share = np.clip(images, np.float32(source[0]), np.float32(source[1])).astype(np.float32)
    share -= np.float32(source[0])
    share *= np.float32((target[1] - target[0]) / (source[1] - source[0]))
    share += np.float32(target[0])
    return np.clip(share, np.float32(target[0]), np.float32(target[1]), out=share)
