"""What a served model is asked and answers: named tensors, one description for server, client and docs.

Everything that changes a result is a tensor, typed and optional; left out, it has the default that its text gives.
Texts and files are uint8 tensors: a BYTES tensor carries lengths of its own, and wrong ones end Triton's Python process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import numpy as np
from numpy.typing import NDArray

from .request import SAMPLES_OF_A_SEED, Settings, make_request
from .sizes import volume_channels
from .spec import ArtifactSpec, Manifest
from .token_choice import Choice, ChoiceSettings
from .token_spec import TokenSpec

Array = NDArray[np.generic]
Format = Literal["float32", "float16", "uint16", "nifti"]
FORMATS = get_args(Format)
MOST_SAMPLES = 64
"""Volumes of one request."""
MOST_STEPS = 1_000_000


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
    one = (1,)
    found = [
        Tensor(name="seed", dtype="uint64", shape=one, text="sample i takes its noise from (seed, i); default: drawn, and answered"),
        Tensor(name="num_samples", dtype="int32", shape=one, text=f"1..{MOST_SAMPLES} volumes, default 1"),
        Tensor(name="first_sample", dtype="int32", shape=one, text="the number i of the first of them, default 0"),
        *_settings(spec),
        Tensor(name="priority", dtype="int32", shape=one, text="-8..8, each level doubles the share, default 0"),
        Tensor(name="deadline_s", dtype="float32", shape=one, text="seconds from arrival after which it is given up, default none"),
        Tensor(name="progress_every", dtype="int32", shape=one, text="steps between reports of progress, default 0: none"),
        Tensor(name="ticket", dtype="uint64", shape=one, text="a number that the caller draws to cancel by, default none"),
        Tensor(name="cancel", dtype="uint64", shape=one, text="nothing is sampled, and the request with this ticket ends; default none"),
        Tensor(name="output_format", dtype="uint8", shape=(-1,), text=f"{', '.join(FORMATS)}; default float16"),
        Tensor(name="region", dtype="uint8", shape=(-1,), text="a client's file in /dev/shm for the volumes, default none"),
        *_images(spec),
    ]  # fmt: skip
    for condition in spec.conditions:
        sizes = tuple(size if isinstance(size, int) else -1 for size in condition.shape) or one
        fields = ", ".join(field.name for field in condition.fields)
        text = condition.description or ("a condition" if fields else "required")
        text = f"{text}: whole, or give {fields}" if fields else text
        found.append(Tensor(name=condition.name, dtype=condition.dtype, shape=sizes, text=text))
        for field in condition.fields:
            text = f"{field.minimum:g}..{field.maximum:g} {field.description}".strip()
            found.append(Tensor(name=field.name, dtype="float32", shape=one, text=text))
    names = [tensor.name for tensor in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"[serve] {spec.name}: {', '.join(twice)} would name two inputs; rename the condition"
        )
    return tuple(found)


def _settings(spec: Manifest) -> list[Tensor]:
    """The inputs of one kind of model alone."""
    if isinstance(spec, ArtifactSpec):
        own = spec.scheduler
        last, spatial = own.noise_schedule.num_train_timesteps, list(spec.latent_shape[1:])
        return [
            Tensor(name="steps", dtype="int32", shape=(1,), text=f"denoising steps, 1..{last}, default {own.steps}"),
            Tensor(name="scheduler", dtype="uint8", shape=(-1,), text=f"ddim, ddpm, pndm, dpm-solver++ or rflow, default {own.scheduler}"),
            Tensor(name="guidance", dtype="float32", shape=(1,), text="weight of classifier-free guidance, 0..100, default none"),
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
        Tensor(name="strength", dtype="float32", shape=(1,), text="with image: how far it is noised, up to 1, default 1"),
    ]  # fmt: skip


def outputs(spec: Manifest) -> tuple[Tensor, ...]:
    """Every output; an answer has those of its `kind`."""
    volume = (-1,) * len(spec.spacing_mm)
    if volume_channels(spec) > 1:
        volume = (-1, *volume)
    return (
        Tensor(name="kind", dtype="uint8", shape=(-1,), text="progress, preview or volume"),
        Tensor(name="sample", dtype="int32", shape=(1,), text="which volume of the request"),
        Tensor(name="step", dtype="int32", shape=(1,), text="steps done"),
        Tensor(name="steps", dtype="int32", shape=(1,), text="steps to do"),
        Tensor(name="seed", dtype="uint64", shape=(1,), text="with it the request gives the same volumes again"),
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


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, read off its tensors: what the model's `submit` takes, and how to answer.

    `settings` are `Settings` of a diffusion model, `ChoiceSettings` of a token model, none of a one-pass model.
    """

    seed: int | None
    samples: int
    first_sample: int
    settings: Any
    condition: Mapping[str, Any]
    size: tuple[int, ...] | None
    image: Array | None
    priority: int
    deadline_s: float | None
    progress_every: int
    preview_every: int
    output_format: Format
    ticket: int | None
    cancel: int | None
    region: str | None

    def arguments(self) -> dict[str, Any]:
        """What of the request `submit` takes by name, as far as it was given."""
        given = {"condition": self.condition or None, "size": self.size, "image": self.image}
        return {**{name: value for name, value in given.items() if value is not None}, **self.settings}


def read_request(spec: Manifest, given: Mapping[str, Array]) -> Asked:
    """The request in `given`, tensors by name.

    Raises ValueError: an unknown name, a wrong dtype or shape, a setting out of range; conditions, size and image are
    checked by `submit`.
    """
    known = {tensor.name: tensor for tensor in inputs(spec)}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"[request] unknown input {name!r}; known: {', '.join(known)}")
        _check(known[name], value)
    form: Any = _text(given, "output_format") or "float16"
    if form not in FORMATS:
        raise ValueError(f"[request] output_format={form!r}: need one of {', '.join(FORMATS)}")
    seed = int(given["seed"][0]) if "seed" in given else None
    samples = _whole(given, "num_samples", 1, 1, MOST_SAMPLES)
    deadline = float(given["deadline_s"][0]) if "deadline_s" in given else None
    if deadline is not None and not 0 < deadline < math.inf:
        raise ValueError(f"[request] deadline_s={deadline:g}: need a number of seconds above 0")
    return Asked(
        seed=seed,
        samples=samples,
        first_sample=_whole(given, "first_sample", 0, 0, SAMPLES_OF_A_SEED - samples),
        settings=_given_settings(spec, seed or 0, given),
        condition=_conditions(spec, given),
        size=tuple(int(one) for one in given["size"]) if "size" in given else None,
        image=given.get("image"),
        priority=_whole(given, "priority", 0, -8, 8),
        deadline_s=deadline,
        progress_every=_whole(given, "progress_every", 0, 0, MOST_STEPS),
        preview_every=_whole(given, "preview_every", 0, 0, MOST_STEPS),
        output_format=form,
        ticket=int(given["ticket"][0]) if "ticket" in given else None,
        cancel=int(given["cancel"][0]) if "cancel" in given else None,
        region=_text(given, "region"),
    )


def _given_settings(spec: Manifest, seed: int, given: Mapping[str, Array]) -> Any:
    """The settings of the kind of model, checked."""
    if isinstance(spec, ArtifactSpec):
        found: Settings = {}
        if "steps" in given:
            found["steps"] = int(given["steps"][0])
        if "scheduler" in given:
            found["scheduler"] = _text(given, "scheduler")
        if "guidance" in given:
            found["guidance"] = float(given["guidance"][0])
        if "strength" in given:
            found["strength"] = float(given["strength"][0])
        make_request(spec, seed, found)
        return found
    chosen = {name: given[name][0].item() for name in ChoiceSettings.__annotations__ if name in given}
    if isinstance(spec, TokenSpec):
        Choice(**chosen).check(spec.num_codes)
    return chosen


def _conditions(spec: Manifest, given: Mapping[str, Array]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for condition in spec.conditions:
        if condition.name in given:
            value = given[condition.name]
            found[condition.name] = value if condition.shape else value.reshape(())
        found |= {
            field.name: float(given[field.name][0]) for field in condition.fields if field.name in given
        }
    return found


def _check(tensor: Tensor, value: Array) -> None:
    fits = value.ndim == len(tensor.shape) and all(
        wanted in (-1, size) for wanted, size in zip(tensor.shape, value.shape, strict=True)
    )
    if not (value.dtype.name == tensor.dtype and fits and value.size):
        shape = ["any" if size == -1 else size for size in tensor.shape]
        raise ValueError(
            f"[request] {tensor.name} is {value.dtype.name} {list(value.shape)}: need {tensor.dtype} {shape}"
        )


def _whole(given: Mapping[str, Array], name: str, default: int, low: int, high: int) -> int:
    value = int(given[name][0]) if name in given else default
    if not low <= value <= high:
        raise ValueError(f"[request] {name}={value}: need {low}..{high}")
    return value


def _text(given: Mapping[str, Array], name: str) -> Any:
    if name not in given:
        return None
    if given[name].size > 100:
        raise ValueError(f"[request] {name}: {given[name].size} letters are more than 100")
    try:
        return text_of(given[name])
    except UnicodeDecodeError as error:
        raise ValueError(f"[request] {name}: not UTF-8 text") from error
