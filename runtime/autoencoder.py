"""Between images and latents: the artifact's `encode` and `decode`, with the scale factor."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .programs import Programs
from .spec import ArtifactSpec
from .volume import Volume

Images = NDArray[np.float32]


def decode(spec: ArtifactSpec, programs: Programs, z: Any) -> Images:
    """Images `[N, 1, D, H, W]` of the latents `z`; see `Model.decode`."""
    latents = _batched("decode", spec, z, spec.latent_shape[0])
    if "decode" not in spec.programs:
        return latents
    image = np.asarray(
        programs.call("decode", {"z": latents / np.float32(spec.scale_factor)})["image"], np.float32
    )
    if not np.isfinite(image).all():
        raise ValueError(
            "[decode] the decoded volume is not finite; check the weights, or export with fp32 weights"
        )
    return image


def encode(spec: ArtifactSpec, programs: Programs, image: Any) -> Images:
    """Latents `[N, C, D', H', W']` of images; see `Model.encode`."""
    array = image.array if isinstance(image, Volume) else np.asarray(image)
    if array.ndim == len(spec.latent_shape) - 1:
        array = array[None]
    if "encode" not in spec.programs:
        return _batched("encode", spec, array, spec.latent_shape[0])
    channels = spec.programs["encode"].inputs[0].shape[1]
    array = _batched("encode", spec, array, int(channels))
    mean = np.asarray(programs.call("encode", {"image": array})["z_mu"], np.float32)
    return mean * np.float32(spec.scale_factor)


def _batched(operation: str, spec: ArtifactSpec, value: Any, channels: int) -> Images:
    array = np.asarray(value)
    rank = len(spec.latent_shape) + 1
    array = array[None] if array.ndim == rank - 1 else array
    if array.ndim != rank or array.shape[1] != channels or array.dtype.kind not in "fiu":
        axes = ", ".join("DHW"[: rank - 2])
        raise ValueError(
            f"[{operation}] got {array.dtype} {array.shape}: need numbers, (N, {channels}, {axes})"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"[{operation}] the input holds NaN or infinity; give finite numbers")
    return np.ascontiguousarray(array, np.float32)
