"""What of a request may be a volume in a file, and the latent of an image."""

from __future__ import annotations

from collections.abc import Sequence

from volcast.runtime.sizes import check_size, volume_shape
from volcast.runtime.spec import ArtifactSpec, ConditionSpec, Manifest
from volcast.runtime.token_spec import TokenSpec


def image_latent(spec: ArtifactSpec, shape: Sequence[int]) -> tuple[int, ...]:
    """The spatial sizes of the latent of an image of this spatial `shape`. ValueError: `encode` does not take it."""
    wanted = spec.programs["encode"].inputs[0].shape[2:]
    if len(wanted) != len(shape):
        raise ValueError(f"[request] image has shape {tuple(shape)}: need {len(wanted)} axes")
    for axis, size in zip(wanted, shape, strict=True):
        if isinstance(axis, str):
            check_size("request image", spec.axis(axis), size)
    own, latent = volume_shape(spec), spec.latent_shape[1:]
    # Axes of one image are multiples of the same blocks: as many voxels a latent voxel as in the artifact's own volume.
    found = tuple(size * one // whole for size, one, whole in zip(shape, latent, own, strict=True))
    if volume_shape(spec, found, "request") != tuple(shape):
        raise ValueError(
            f"[request] image has shape {tuple(shape)}: need one as {own}; crop, pad or resample it"
        )
    return found


def takes_image(spec: Manifest) -> bool:
    """Whether a request may hold an image, to start from or whose style to take; it has one channel."""
    takes = "encode" in spec.programs and not isinstance(spec, TokenSpec)
    return takes and spec.programs["encode"].inputs[0].shape[1] == 1


def takes_file(spec: Manifest, condition: ConditionSpec) -> bool:
    """Whether the condition is a volume of one channel: a label map, or an image."""
    dims = len(spec.spacing_mm)
    shape = condition.shape[1:] if condition.shape[:1] == (1,) else condition.shape
    return not condition.fields and len(shape) == dims and all(isinstance(size, str) for size in shape)
