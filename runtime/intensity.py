"""Intensities of volumes: a network's own, and those in which volumes are written and given (CT: Hounsfield units)."""

from __future__ import annotations

from typing import Annotated, Any, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from .frozen import Finite, Frozen

Images = NDArray[np.float32]


@final
class IntensitySpec(Frozen):
    """What the network's intensities are in volumes as they are written and given: `network[0]..network[1]` becomes
    `written[0]..written[1]`, linearly, clipped at both ends (MAISI: 0..1 and -1000..1000 HU).

    `written` lies in int16, as CT is stored: a volume may be rounded to whole numbers and none overflows.
    """

    network: tuple[Finite, Finite]
    written: tuple[Finite, Finite]
    unit: Annotated[str, Field(min_length=1, max_length=20)]

    @model_validator(mode="after")
    def _rising(self) -> IntensitySpec:
        if self.network[0] >= self.network[1] or not -(2**15) <= self.written[0] < self.written[1] < 2**15:
            raise ValueError(
                f"network {self.network} to written {self.written}: need rising pairs, the second within int16"
            )
        return self


def written(spec: IntensitySpec | None, images: NDArray[Any]) -> Images:
    """Images with the network's intensities as volumes have them; None: as they are."""
    return _mapped(images, spec.network, spec.written) if spec is not None else np.asarray(images, np.float32)


def of_network(spec: IntensitySpec | None, images: NDArray[Any]) -> Images:
    """The inverse of `written` but for what it clipped."""
    return _mapped(images, spec.written, spec.network) if spec is not None else np.asarray(images, np.float32)


def _mapped(images: NDArray[Any], source: tuple[float, float], target: tuple[float, float]) -> Images:
    """In float32: an image is large. Clipped at last too, so that rounding leaves the range nowhere."""
    share: Images = np.clip(images, np.float32(source[0]), np.float32(source[1])).astype(np.float32)
    share -= np.float32(source[0])
    share *= np.float32((target[1] - target[0]) / (source[1] - source[0]))
    share += np.float32(target[0])
    np.clip(share, np.float32(target[0]), np.float32(target[1]), out=share)
    return share
