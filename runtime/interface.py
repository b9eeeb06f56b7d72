"""What a served model is asked and answers: named tensors, one description for server, client and docs.

Everything that changes a result is a tensor, typed and optional; left out, it has the default that its text gives.
Texts and files are uint8 tensors: a BYTES tensor carries lengths of its own, and wrong ones end Triton's Python process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, final, get_args

import numpy as np
from numpy.typing import NDArray

from .inpaint import Inpaint
from .request import SAMPLES_OF_A_SEED, Settings, make_request, split_sweep
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
MOST_CALLS = 10_000
"""Of the network for one volume that is inpainted: each is a row of a table that the request holds."""
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
    found = [
        Tensor(name="seed", dtype="uint64", shape=(1,), text="sample i takes its noise from (seed, i); default: drawn, and answered"),
        Tensor(name="num_samples", dtype="int32", shape=(1,), text=f"1..{MOST_SAMPLES} volumes, default 1"),
        Tensor(name="first_sample", dtype="int32", shape=(1,), text="the number i of the first of them, default 0"),
        *_settings(spec),
        Tensor(name="priority", dtype="int32", shape=(1,), text="-8..8, each level doubles the share, default 0"),
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
            Tensor(name="guidance", dtype="float32", shape=(-1,), text="weight of classifier-free guidance, 0..100, or several: for each sample a volume at each; default none"),
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
        Tensor(name="inpaint_mask", dtype="float32", shape=image, text="with image, of its shape: not 0 where to paint anew, default none"),
        Tensor(name="inpaint_resamples", dtype="int32", shape=(1,), text=f"with inpaint_mask: runs of each stretch of steps, 1..1000, at most {MOST_CALLS} steps in all, default {Inpaint.resamples}"),
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
                dtype="float32",
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


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, read off its tensors: what the model's `submit` takes, and how to answer.

    `settings` are `Settings` of a diffusion model, `ChoiceSettings` of a token model, none of a one-pass model. With
    `weights` of guidance (else empty) each of the `samples` is a volume at each of them, numbered as `Model.sample_many`
    yields them.
    """

    seed: int | None
    samples: int
    first_sample: int
    settings: Any
    weights: tuple[float, ...]
    condition: Mapping[str, Any]
    negative: Mapping[str, Any]
    size: tuple[int, ...] | None
    image: Array | None
    inpaint: Inpaint | None
    priority: int
    deadline_s: float | None
    progress_every: int
    preview_every: int
    output_format: Format
    ticket: int | None
    cancel: int | None
    region: str | None

    @property
    def volumes(self) -> int:
        """How many are answered."""
        return self.samples * (len(self.weights) or 1)

    def weight(self, volume: int) -> float | None:
        """Of guidance, where there are several."""
        return self.weights[volume % len(self.weights)] if self.weights else None

    def arguments(self, volume: int) -> dict[str, Any]:
        """What `submit` takes by name for one of the volumes, as far as it was given."""
        given = {
            "condition": self.condition or None, "negative": self.negative or None, "size": self.size,
            "image": self.image, "inpaint": self.inpaint,
        }  # fmt: skip
        own = {"guidance": self.weight(volume)} if self.weights else {}
        sample = self.first_sample + volume // (len(self.weights) or 1)
        found = {name: value for name, value in given.items() if value is not None}
        return {"sample": sample, **found, **self.settings, **own}


def read_request(spec: Manifest, given: Mapping[str, Array]) -> Asked:
    """The request in `given`, tensors by name.

    Raises ValueError: an unknown name, a wrong dtype or shape, a setting out of range; conditions, size, image and mask
    are checked by `submit`.
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
    settings = _given_settings(spec, given)
    weights: tuple[float, ...] = ()
    if isinstance(spec, ArtifactSpec):
        weights, settings = split_sweep(spec, seed or 0, settings)
        make_request(spec, seed or 0, settings)
    if samples * len(weights) > MOST_SAMPLES:
        raise ValueError(
            f"[request] guidance: {samples} samples at {len(weights)} weights are {samples * len(weights)} volumes: need "
            f"1..{MOST_SAMPLES}"
        )
    return Asked(
        seed=seed,
        samples=samples,
        first_sample=_whole(given, "first_sample", 0, 0, SAMPLES_OF_A_SEED - samples),
        settings=settings,
        weights=weights,
        condition=_conditions(spec, given),
        negative=_conditions(spec, given, NEGATIVE),
        size=tuple(int(one) for one in given["size"]) if "size" in given else None,
        image=given.get("image"),
        inpaint=_inpaint(spec, given, settings),
        priority=_whole(given, "priority", 0, -8, 8),
        deadline_s=deadline,
        progress_every=_whole(given, "progress_every", 0, 0, MOST_STEPS),
        preview_every=_whole(given, "preview_every", 0, 0, MOST_STEPS),
        output_format=form,
        ticket=int(given["ticket"][0]) if "ticket" in given else None,
        cancel=int(given["cancel"][0]) if "cancel" in given else None,
        region=_text(given, "region"),
    )


def _given_settings(spec: Manifest, given: Mapping[str, Array]) -> Any:
    """The settings of the kind of model; a diffusion model's are not checked yet."""
    if isinstance(spec, ArtifactSpec):
        found: Settings = {}
        if "steps" in given:
            found["steps"] = int(given["steps"][0])
        if "scheduler" in given:
            found["scheduler"] = _text(given, "scheduler")
        if "guidance" in given:
            weights = [decimal(weight) for weight in given["guidance"]]
            found["guidance"] = weights if len(weights) > 1 else weights[0]
        if "strength" in given:
            found["strength"] = decimal(given["strength"][0])
        return found
    chosen = {name: given[name][0].item() for name in ChoiceSettings.__annotations__ if name in given}
    if isinstance(spec, TokenSpec):
        Choice(**chosen).check(spec.num_codes)
    return chosen


def _inpaint(spec: Manifest, given: Mapping[str, Array], settings: Settings) -> Inpaint | None:
    names = [name for name in given if name.startswith("inpaint_")]
    if not names or not isinstance(spec, ArtifactSpec):
        return None
    if "inpaint_mask" not in given:
        raise ValueError(f"[request] {', '.join(names)} without inpaint_mask: give it, or leave these out")
    resamples = _whole(given, "inpaint_resamples", Inpaint.resamples, 1, 1000)
    sampler = make_request(spec, 0, settings).sampler
    calls = ((sampler.steps or spec.scheduler.steps) - sampler.start) * resamples
    if calls > MOST_CALLS:
        raise ValueError(
            f"[request] inpaint_resamples={resamples}: {calls} steps in all: need {MOST_CALLS} or fewer; take fewer steps"
        )
    jump = _whole(given, "inpaint_jump_length", Inpaint.jump_length, 1, MOST_CALLS)
    paste = bool(_whole(given, "inpaint_paste", int(Inpaint.paste), 0, 1))
    return Inpaint(given["inpaint_mask"], resamples, jump, paste)


def _conditions(spec: Manifest, given: Mapping[str, Array], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for condition in spec.conditions:
        if prefix + condition.name in given:
            value = given[prefix + condition.name]
            found[condition.name] = value if condition.shape else value.reshape(())
        for field in condition.fields:
            if prefix + field.name in given:
                found[field.name] = decimal(given[prefix + field.name][0])
    return found


def decimal(value: np.generic) -> float:
    """The number that was written, of which `value` is the nearest float32: 0.9 and not 0.89999998, whose bits, and
    with `strength` steps, would not be those of `Model.sample`."""
    return float(str(value))


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
