"""What a served model is asked and answers: named tensors, one description for server, client and docs.

Everything that changes a result is a tensor, typed and optional; left out, it has the default that its text gives.
Texts and files are uint8 tensors: a BYTES tensor carries lengths of its own, and wrong ones end Triton's Python process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, final, get_args

import numpy as np
from numpy.typing import NDArray

from .inpaint import MOST_CALLS, Inpaint
from .sizes import volume_channels
from .spec import ArtifactSpec, Manifest
from .token_spec import TokenSpec

Array = NDArray[np.generic]
Format = Literal["float32", "float16", "uint16", "nifti"]
FORMATS = get_args(Format)
MOST_SAMPLES = 64
"""Volumes of one request."""
MOST_ROWS = 64_000
"""Of the tables of one request that inpaints: those of 64 volumes of 1000 steps without."""
NEGATIVE = "negative_"
"""Before the name of a condition or field: of guidance's other branch."""


@final
@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One input or output. `dtype` is numpy's name; -1 in `shape`: any size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    text: str


def inputs(spec: Manifest) -> tuple[Tensor, ...]:
    """Every input of a served artifact, by its kind. A model refuses a request that lacks one whose text says "required".

    Raises ValueError: a condition or field has the name of a setting.
    """
    shares = isinstance(spec, ArtifactSpec)
    found = [
        Tensor(name="seed", dtype="uint64", shape=(1,), text="sample i takes its noise from (seed, i); default: drawn, and answered"),
        Tensor(name="num_samples", dtype="int32", shape=(1,), text=f"1..{MOST_SAMPLES} volumes, default 1"),
        Tensor(name="first_sample", dtype="int32", shape=(1,), text="the number i of the first of them, default 0"),
        *_settings(spec),
        Tensor(name="priority", dtype="int32", shape=(1,), text=f"-8..8, {'each level doubles the share' if shares else 'higher ones first'}, default 0"),
        Tensor(name="deadline_s", dtype="float32", shape=(1,), text="seconds from arrival after which it is given up, default none"),
        Tensor(name="progress_every", dtype="int32", shape=(1,), text="steps between reports of progress, default 0: none"),
        Tensor(name="ticket", dtype="uint64", shape=(1,), text="a number that the caller draws to cancel by, default none"),
        Tensor(name="cancel", dtype="uint64", shape=(1,), text="nothing is sampled, and the request with this ticket ends; default none"),
        Tensor(name="output_format", dtype="uint8", shape=(-1,), text=f"{', '.join(FORMATS)}; default float16"),
        Tensor(name="region", dtype="uint8", shape=(-1,), text="a client's file in /dev/shm for the volumes, default none"),
        *_images(spec),
    ]  # fmt: skip
    conditions = _condition_inputs(spec)
    found += conditions
    if isinstance(spec, ArtifactSpec):
        text = "with guidance: {} of the other branch (a negative prompt)"
        found += [replace(one, name=NEGATIVE + one.name, text=text.format(one.name)) for one in conditions]
    names = [tensor.name for tensor in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"[serve] {spec.name}: {', '.join(twice)} would name two inputs; rename the condition"
        )
    return tuple(found)


def _condition_inputs(spec: Manifest) -> list[Tensor]:
    found = []
    for condition in spec.conditions:
        sizes = tuple(size if isinstance(size, int) else -1 for size in condition.shape) or (1,)
        fields = ", ".join(field.name for field in condition.fields)
        text = condition.description or ("a condition" if fields else "required")
        text = f"{text}: whole, or give {fields}" if fields else text
        found.append(Tensor(name=condition.name, dtype=condition.dtype, shape=sizes, text=text))
        for field in condition.fields:
            text = f"{field.minimum:g}..{field.maximum:g} {field.description}".strip()
            found.append(Tensor(name=field.name, dtype="float32", shape=(1,), text=text))
    return found


def _settings(spec: Manifest) -> list[Tensor]:
    """The inputs of one kind of model alone."""
    if isinstance(spec, ArtifactSpec):
        own = spec.scheduler
        last, spatial = own.noise_schedule.num_train_timesteps, list(spec.latent_shape[1:])
        return [
            Tensor(name="steps", dtype="int32", shape=(1,), text=f"denoising steps, 1..{last}, default {own.steps}"),
            Tensor(name="scheduler", dtype="uint8", shape=(-1,), text=f"ddim, ddpm, pndm, dpm-solver++ or rflow, default {own.scheduler}"),
            Tensor(name="guidance", dtype="float64", shape=(-1,), text="weight of classifier-free guidance, 0..100, or several: for each sample a volume at each; default none"),
            Tensor(name="size", dtype="int32", shape=(len(spatial),), text=f"the latent's sizes, default {spatial}"),
            Tensor(name="preview_every", dtype="int32", shape=(1,), text="steps between previews, default 0: none"),
        ]  # fmt: skip
    if isinstance(spec, TokenSpec):
        return [
            Tensor(name="temperature", dtype="float64", shape=(1,), text="above 0; the logits are divided by it, default 1"),
            Tensor(name="top_k", dtype="int32", shape=(1,), text=f"only the k most probable codes, 1..{spec.num_codes}, default all"),
            Tensor(name="top_p", dtype="float64", shape=(1,), text="only the most probable codes that sum to p, up to 1, default all"),
        ]  # fmt: skip
    return []


def _images(spec: Manifest) -> list[Tensor]:
    if "encode" not in spec.programs or isinstance(spec, TokenSpec):
        return []
    image = (-1,) * len(spec.spacing_mm)
    if not isinstance(spec, ArtifactSpec):
        return [Tensor(name="image", dtype="float32", shape=image, text="an image whose style the volumes have, default none")]  # fmt: skip
    return [
        Tensor(name="image", dtype="float32", shape=image, text="an image to start from, default none"),
        Tensor(name="strength", dtype="float64", shape=(1,), text="with image: how far it is noised, up to 1, default 1"),
        Tensor(name="inpaint_mask", dtype="float32", shape=image, text="with image, of its shape: not 0 where to paint anew, default none"),
        Tensor(name="inpaint_resamples", dtype="int32", shape=(1,), text=f"with inpaint_mask: runs of each stretch of steps, 1..1000, at most {MOST_CALLS} steps a volume, {MOST_ROWS} a request, default {Inpaint.resamples}"),
        Tensor(name="inpaint_jump_length", dtype="int32", shape=(1,), text=f"with inpaint_mask: steps of such a stretch, default {Inpaint.jump_length}"),
        Tensor(name="inpaint_paste", dtype="int32", shape=(1,), text="with inpaint_mask: 1 puts the image's own voxels back, 0 leaves the decoder's, default 1"),
    ]  # fmt: skip


def outputs(spec: Manifest) -> tuple[Tensor, ...]:
    """Every output; an answer has those of its `kind`."""
    volume = (-1,) * len(spec.spacing_mm)
    if volume_channels(spec) > 1:
        volume = (-1, *volume)
    which, guidance = "which volume of the request", []
    if isinstance(spec, ArtifactSpec):
        which += "; with several weights sample 0 at each, then sample 1"
        guidance = [
            Tensor(
                name="guidance",
                dtype="float64",
                shape=(1,),
                text="of a volume, where several weights were given: its own",
            )
        ]
    return (
        Tensor(name="kind", dtype="uint8", shape=(-1,), text="progress, preview or volume"),
        Tensor(name="sample", dtype="int32", shape=(1,), text=which),
        Tensor(name="step", dtype="int32", shape=(1,), text="steps done"),
        Tensor(name="steps", dtype="int32", shape=(1,), text="steps to do"),
        Tensor(name="seed", dtype="uint64", shape=(1,), text="with it the request gives the same volumes again"),
        *guidance,
        Tensor(name="volume_float32", dtype="float32", shape=volume, text="of a preview or volume, by output_format"),
        Tensor(name="volume_float16", dtype="float16", shape=volume, text="likewise"),
        Tensor(name="volume_uint16", dtype="uint16", shape=volume, text="likewise: value = scale[0] * number + scale[1]"),
        Tensor(name="scale", dtype="float32", shape=(2,), text="with volume_uint16"),
        Tensor(name="nifti", dtype="uint8", shape=(-1,), text="likewise: a .nii.gz file"),
        Tensor(name="region_offset", dtype="int64", shape=(1,), text="of a volume, where a region was given: its first byte"),
        Tensor(name="region_shape", dtype="int64", shape=(-1,), text="likewise: its sizes"),
        Tensor(name="affine", dtype="float64", shape=(4, 4), text="of a preview or volume: voxel indices to millimetres, RAS+"),
        Tensor(name="seconds", dtype="float32", shape=(2,), text="of a volume: queue and steps, decode"),
    )  # fmt: skip


def as_bytes(value: str | bytes) -> NDArray[np.uint8]:
    """A text or file as a tensor."""
    content = value.encode() if isinstance(value, str) else value
    return np.frombuffer(content, np.uint8).copy()


def text_of(tensor: Array) -> str:
    """The text in a tensor (UnicodeDecodeError if it is not UTF-8)."""
    return tensor.tobytes().decode()
