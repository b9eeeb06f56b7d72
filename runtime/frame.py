"""Where samples lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .low_res import refined
from .spec import LOW_RES, ArtifactSpec
from .volume import Volume


def place_of(
    spec: ArtifactSpec, operation: str, image: Any, conditions: Iterable[Mapping[str, Any]]
) -> Volume | None:
    """What the samples lie where: the image, or else a condition that is a Volume (a label map), which an upscaler's
    low-resolution image is more finely. None: neither has a place.

    Raises ValueError: the conditions lie in different places.
    """
    given = [("", image)] if image is not None else [item for one in conditions for item in one.items()]
    volumes = [
        refined(spec, one) if spec.low_res is not None and name == LOW_RES else one
        for name, one in given
        if isinstance(one, Volume)
    ]
    if any((one.affine != volumes[0].affine).any() for one in volumes):
        raise ValueError(
            f"[{operation}] the conditions lie in different places (affine): sample them one by one, or write them with "
            "one affine"
        )
    return volumes[0] if volumes else None
