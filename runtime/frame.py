"""Where samples lie, and images that go with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .low_res import refined
from .spec import LOW_RES, ArtifactSpec, Manifest
from .volume import Volume

SPACING_TOLERANCE = 0.01
"""Relative: what a header's float32 and rounding to hundredths of a millimetre leave."""


def check_grid(
    where: str, affine: NDArray[np.float64], spacing: Sequence[float], spec: Manifest | None,
    coarser: Sequence[int] = (1, 1, 1),
) -> None:  # fmt: skip
    """ValueError, which begins with `where`: other axes than those of the volumes that are sampled (to the right, forward,
    up), or other voxels than the model's, `coarser` times as large for an upscaler's low-resolution image."""
    import nibabel

    dims = 3 if spec is None else len(spec.spacing_mm)
    axes = "".join(str(one) for one in nibabel.aff2axcodes(affine)[:dims])
    if axes != "RAS"[:dims]:
        raise ValueError(
            f"{where} has axes {axes}: need {'RAS'[:dims]}, as the volumes that are sampled; turn it with "
            "nibabel.as_closest_canonical"
        )
    if spec is None or spec.provenance.get("spacing_mm") == "assumed 1 mm":
        return
    wanted = tuple(size * factor for size, factor in zip(spec.spacing_mm, coarser, strict=False))
    if not np.allclose(spacing[:dims], wanted, rtol=SPACING_TOLERANCE, atol=0):
        raise ValueError(
            f"{where} has voxels of {' x '.join(f'{one:g}' for one in spacing)} mm: the model has "
            f"{' x '.join(f'{one:g}' for one in wanted)}; resample it, labels by nearest neighbour"
        )


def fitted(where: str, image: Any, spec: Manifest) -> Any:
    """`image` as a model takes it: a Volume must lie as `check_grid` says, and one slice for a 2D model loses its third
    axis; an array stays as it is."""
    if not isinstance(image, Volume):
        return image
    check_grid(where, image.affine, image.spacing_mm, spec)
    if len(spec.spacing_mm) == 3 or len(image.spacing_mm) == 2 or image.array.shape[-1] != 1:
        return image
    return Volume(np.ascontiguousarray(image.array[..., 0]), image.affine, image.spacing_mm[:2])


def place_of(
    spec: Manifest, operation: str, image: Any, conditions: Iterable[Mapping[str, Any]]
) -> Volume | None:
    """What the samples lie where: the image, or else a condition that is a Volume (a label map), which an upscaler's
    low-resolution image is more finely. None: neither has a place.

    Raises ValueError: the conditions lie in different places.
    """
    given = [("", image)] if image is not None else [item for one in conditions for item in one.items()]
    volumes = [
        refined(spec, one) if isinstance(spec, ArtifactSpec) and spec.low_res and name == LOW_RES else one
        for name, one in given
        if isinstance(one, Volume)
    ]
    if any((one.affine != volumes[0].affine).any() for one in volumes):
        raise ValueError(
            f"[{operation}] the conditions lie in different places (affine): sample them one by one, or write them with "
            "one affine"
        )
    return volumes[0] if volumes else None
