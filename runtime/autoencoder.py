"""Between images and latents: the artifact's `encode` and `decode`, with the scale factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory_limit import DecodePlan, MemoryLimit
from .programs import Programs, bind
from .slab_decode import decode_slabs
from .spec import ArtifactSpec
from .volume import Volume

Images = NDArray[np.float32]


def decode(spec: ArtifactSpec, programs: Programs, z: Any) -> Images:
    """Images `[N, 1, D, H, W]` of the latents `z`; see `Model.decode`."""
    latents = _batched("decode", spec, z, spec.latent_shape[0])
    if "decode" not in spec.programs:
        return latents
    latents = latents / np.float32(spec.scale_factor)
    image = (
        _whole(programs, latents) if programs.memory is None else _within(programs, programs.memory, latents)
    )
    if not np.isfinite(image).all():
        raise ValueError(
            "[decode] the decoded volume is not finite; check the weights, or export with fp32 weights"
        )
    return image


def decode_plan(programs: Programs, memory: MemoryLimit, shape: Sequence[int]) -> DecodePlan:
    """How latents of a shape `N C D H W` are decoded now, within the limit."""
    return memory.plan_decode(
        bind("decode", programs.describe("decode"), {"z": tuple(shape)}), programs.opened()
    )


def _whole(programs: Programs, latents: Images) -> Images:
    return np.asarray(programs.call("decode", {"z": latents})["image"], np.float32)


def _within(programs: Programs, memory: MemoryLimit, latents: Images) -> Images:
    """In as little memory as the limit asks for: all at once, one by one, or one by one in slabs."""
    plan = decode_plan(programs, memory, latents.shape)
    if plan.batch == len(latents):
        return _whole(programs, latents)
    images: Images | None = None
    if plan.program is not None:
        programs.close("decode")
    for place in range(len(latents)):
        one = latents[place : place + 1]
        if plan.program is None:
            image = _whole(programs, one)
        else:
            image = decode_slabs(plan.program, plan.passes, programs.open_alone, one)
        if len(latents) == 1:
            return image
        if images is None:
            images = np.empty((len(latents), *image.shape[1:]), np.float32)
        images[place] = image[0]
        del image
    assert images is not None
    return images


def encode(spec: ArtifactSpec, programs: Programs, image: Any) -> Images:
    """Latents `[N, C, D', H', W']` of images; see `Model.encode`."""
    array = image.array if isinstance(image, Volume) else np.asarray(image)
    if array.ndim == len(spec.latent_shape) - 1:
        array = array[None]
    if "encode" not in spec.programs:
        return _batched("encode", spec, array, spec.latent_shape[0])
    channels = spec.programs["encode"].inputs[0].shape[1]
    array = _batched("encode", spec, array, int(channels))
    if programs.memory is not None:
        sizes = bind("encode", programs.describe("encode"), {"image": array.shape})
        programs.close("decode")
        programs.memory.check_encode(sizes, programs.opened())
    mean = np.asarray(programs.call("encode", {"image": array})["z_mu"], np.float32)
    if programs.memory is not None:
        programs.close("encode")
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
