"""Between images and latents: the artifact's `encode` and `decode`, with the scale factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .conditions import resolve
from .frame import fitted
from .intensity import of_network, written
from .job import Job
from .memory_limit import DecodePlan, MemoryLimit
from .programs import Programs, bind
from .sizes import latent_sizes
from .slab_decode import decode_slabs
from .spec import ArtifactSpec

Images = NDArray[np.float32]
Given = Mapping[str, NDArray[np.generic]]
"""What a decoder takes besides latents, `[N, ...]` by name: SPADE's label maps."""
NOTHING: Given = MappingProxyType({})


def decoder_inputs(spec: ArtifactSpec) -> list[str]:
    """The names of what the decoder takes besides latents."""
    inputs = spec.programs["decode"].inputs if "decode" in spec.programs else ()
    return [tensor.name for tensor in inputs if tensor.name != "z"]


def decoder_conditions(spec: ArtifactSpec, job: Job, part: range) -> Given:
    """What the decoder is given of a job's conditions for the samples `part`."""
    names = decoder_inputs(spec)
    values = job.conditions(part) if names else {}
    return {name: values[name] for name in names}


def check_given(spec: ArtifactSpec, z: NDArray[Any], condition: Mapping[str, Any] | None) -> Given:
    """What the decoder is given for latents `z` `[N, C, D', H', W']` or `[C, D', H', W']`, checked (ValueError)."""
    rank = len(spec.latent_shape)
    names = decoder_inputs(spec)
    if not names or z.ndim < rank:
        return NOTHING
    _, sizes = latent_sizes(spec, z.shape[-rank + 1 :], "decode")
    chosen = spec.model_copy(
        update={"conditions": tuple(one for one in spec.conditions if one.name in names)}
    )
    values = resolve(chosen, condition, sizes).values
    count = len(z) if z.ndim > rank else 1
    return {name: np.repeat(values[name][None], count, axis=0) for name in names}


def decode(spec: ArtifactSpec, programs: Programs, z: Any, given: Given = NOTHING) -> Images:
    """Images `[N, 1, D, H, W]` of the latents `z`; see `Model.decode`."""
    latents = _batched("decode", spec, z, spec.latent_shape[0])
    if "decode" not in spec.programs:
        return written(spec.intensity, latents)
    latents = latents / np.float32(spec.scale_factor)
    image = (
        _whole(programs, latents, given)
        if programs.memory is None
        else _within(programs, programs.memory, latents, given)
    )
    if not np.isfinite(image).all():
        raise ValueError(
            "[decode] the decoded volume is not finite; check the weights, or export with fp32 weights"
        )
    return written(spec.intensity, image)


def decode_plan(
    programs: Programs, memory: MemoryLimit, shape: Sequence[int], given: Given = NOTHING
) -> DecodePlan:
    """How latents of a shape `N C D H W` are decoded now, within the limit."""
    shapes = {"z": tuple(shape)} | {name: value.shape for name, value in given.items()}
    return memory.plan_decode(bind("decode", programs.describe("decode"), shapes), programs.opened())


def _whole(programs: Programs, latents: Images, given: Given) -> Images:
    return np.asarray(programs.call("decode", {"z": latents, **given})["image"], np.float32)


def _within(programs: Programs, memory: MemoryLimit, latents: Images, given: Given) -> Images:
    """In as little memory as the limit asks for: all at once, one by one, or one by one in slabs."""
    plan = decode_plan(programs, memory, latents.shape, given)
    if plan.batch == len(latents):
        return _whole(programs, latents, given)
    images: Images | None = None
    if plan.program is not None:
        programs.close("decode")
    for place in range(len(latents)):
        one = latents[place : place + 1]
        if plan.program is None:
            image = _whole(programs, one, {name: value[place : place + 1] for name, value in given.items()})
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
    array = np.asarray(fitted("[encode] the image", image, spec))
    if array.ndim == len(spec.latent_shape) - 1:
        array = array[None]
    if "encode" not in spec.programs:
        return of_network(spec.intensity, _batched("encode", spec, array, spec.latent_shape[0]))
    channels = spec.programs["encode"].inputs[0].shape[1]
    array = of_network(spec.intensity, _batched("encode", spec, array, int(channels)))
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
