"""What a served model is asked and answers: named tensors, one description for server, gateway, client and docs.

Everything that changes a result is a tensor, typed and optional; left out, it has the default that its text gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import numpy as np
from numpy.typing import NDArray

from .request import Settings
from .spec import ArtifactSpec

Array = NDArray[np.generic]
Format = Literal["float32", "float16", "uint16", "nifti"]
FORMATS = get_args(Format)
MOST_SAMPLES = 64
"""Volumes of one request."""


@final
@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One input or output. `dtype` is numpy's name, or "bytes" for text and files; -1 in `shape`: any size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    text: str


def inputs(spec: ArtifactSpec) -> tuple[Tensor, ...]:
    """Every input of a served artifact, all optional."""
    last, schedule = spec.scheduler.noise_schedule.num_train_timesteps, spec.scheduler
    rank = len(spec.latent_shape) - 1
    one = (1,)
    found = [
        Tensor(name="seed", dtype="uint64", shape=one, text="noise of sample i is (seed, i); left out: drawn, and answered"),
        Tensor(name="num_samples", dtype="int32", shape=one, text=f"1..{MOST_SAMPLES} volumes, default 1"),
        Tensor(name="steps", dtype="int32", shape=one, text=f"denoising steps, 1..{last}, default {schedule.steps}"),
        Tensor(name="scheduler", dtype="bytes", shape=one, text=f"ddim, ddpm, pndm, dpm-solver++ or rflow, default {schedule.scheduler}"),
        Tensor(name="guidance", dtype="float32", shape=one, text="weight of classifier-free guidance, 0..100, default none"),
        Tensor(name="size", dtype="int32", shape=(rank,), text=f"the latent's sizes, default {list(spec.latent_shape[1:])}"),
        Tensor(name="priority", dtype="int32", shape=one, text="-8..8, each level doubles the share, default 0"),
        Tensor(name="deadline_s", dtype="float32", shape=one, text="seconds from arrival after which it is given up, default none"),
        Tensor(name="preview_every", dtype="int32", shape=one, text="steps between previews, default 0: none"),
        Tensor(name="output_format", dtype="bytes", shape=one, text=f"{', '.join(FORMATS)}; default float16"),
    ]  # fmt: skip
    if "encode" in spec.programs:
        found += [
            Tensor(name="image", dtype="float32", shape=(-1,) * rank, text="an image to start from, default none"),
            Tensor(name="strength", dtype="float32", shape=one, text="with image: how far it is noised, up to 1, default 1"),
        ]  # fmt: skip
    for condition in spec.conditions:
        sizes = tuple(size if isinstance(size, int) else -1 for size in condition.shape) or (1,)
        named = ", ".join(one.name for one in condition.fields)
        text = f"the whole condition; or give {named}" if named else condition.description or "required"
        found.append(Tensor(name=condition.name, dtype=condition.dtype, shape=sizes, text=text))
        found += [
            Tensor(name=one.name, dtype="float32", shape=(1,), text=f"{one.minimum:g}..{one.maximum:g} {one.description}".strip())
            for one in condition.fields
        ]  # fmt: skip
    return tuple(found)


def outputs(spec: ArtifactSpec) -> tuple[Tensor, ...]:
    """Every output; an answer has those of its `kind`."""
    rank = len(spec.latent_shape) - 1
    volume = (-1,) * rank
    return (
        Tensor(name="kind", dtype="bytes", shape=(1,), text="progress, preview or volume"),
        Tensor(name="sample", dtype="int32", shape=(1,), text="which volume of the request"),
        Tensor(name="step", dtype="int32", shape=(1,), text="steps done"),
        Tensor(name="steps", dtype="int32", shape=(1,), text="steps to do"),
        Tensor(name="seed", dtype="uint64", shape=(1,), text="of a volume: with it the request gives the same volume again"),
        Tensor(name="volume_float32", dtype="float32", shape=volume, text="of a preview or volume, by output_format"),
        Tensor(name="volume_float16", dtype="float16", shape=volume, text="likewise"),
        Tensor(name="volume_uint16", dtype="uint16", shape=volume, text="likewise: value = scale[0] * number + scale[1]"),
        Tensor(name="scale", dtype="float32", shape=(2,), text="with volume_uint16"),
        Tensor(name="nifti", dtype="bytes", shape=(1,), text="a .nii.gz file, by output_format"),
        Tensor(name="affine", dtype="float64", shape=(4, 4), text="voxel indices to millimetres, RAS+"),
        Tensor(name="seconds", dtype="float32", shape=(2,), text="of a volume: until its last step, decode"),
    )  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, read off its tensors: what `Model.submit` takes, and how to answer. Values are not checked yet."""

    seed: int | None
    samples: int
    settings: Settings
    condition: Mapping[str, Any]
    size: tuple[int, ...] | None
    image: Array | None
    priority: int
    deadline_s: float | None
    preview_every: int
    output_format: Format


def read_request(spec: ArtifactSpec, given: Mapping[str, Array]) -> Asked:
    """The request in `given`, tensors by name.

    Raises ValueError: an unknown name, a wrong dtype or shape, a number of samples, a format or a text out of range.
    """
    known = {tensor.name: tensor for tensor in inputs(spec)}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"[request] unknown input {name!r}; known: {', '.join(known)}")
        _check(known[name], value)
    samples = int(_one(given, "num_samples", 1))
    if not 1 <= samples <= MOST_SAMPLES:
        raise ValueError(f"[request] num_samples={samples}: need 1..{MOST_SAMPLES}")
    form = _text(given, "output_format") or "float16"
    if form not in FORMATS:
        raise ValueError(f"[request] output_format={form!r}: need one of {', '.join(FORMATS)}")
    every = int(_one(given, "preview_every", 0))
    if every < 0:
        raise ValueError(f"[request] preview_every={every}: need 0 (none) or more")
    settings: Settings = {}
    if "steps" in given:
        settings["steps"] = int(_one(given, "steps", 0))
    if "scheduler" in given:
        settings["scheduler"] = _text(given, "scheduler")  # type: ignore[typeddict-item]  # checked with the settings
    if "guidance" in given:
        settings["guidance"] = float(_one(given, "guidance", 0))
    if "strength" in given:
        settings["strength"] = float(_one(given, "strength", 1))
    return Asked(
        seed=int(_one(given, "seed", 0)) if "seed" in given else None,
        samples=samples,
        settings=settings,
        condition=_conditions(spec, given),
        size=tuple(int(one) for one in given["size"]) if "size" in given else None,
        image=given.get("image"),
        priority=int(_one(given, "priority", 0)),
        deadline_s=float(_one(given, "deadline_s", 0)) if "deadline_s" in given else None,
        preview_every=every,
        output_format=form,
    )


def _conditions(spec: ArtifactSpec, given: Mapping[str, Array]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for condition in spec.conditions:
        if condition.name in given:
            value = given[condition.name]
            found[condition.name] = value if condition.shape else value.reshape(())
        found |= {one.name: float(_one(given, one.name, 0)) for one in condition.fields if one.name in given}
    return found


def _check(tensor: Tensor, value: Array) -> None:
    kinds = {"bytes": "OSU"}
    good = value.dtype.kind in kinds["bytes"] if tensor.dtype == "bytes" else value.dtype.name == tensor.dtype
    fits = value.ndim == len(tensor.shape) and all(
        wanted in (-1, size) for wanted, size in zip(tensor.shape, value.shape, strict=True)
    )
    if not (good and fits and value.size):
        shape = ["any" if size == -1 else size for size in tensor.shape]
        raise ValueError(
            f"[request] {tensor.name} is {value.dtype.name} {list(value.shape)}: need {tensor.dtype} {shape}"
        )


def _one(given: Mapping[str, Array], name: str, default: float) -> Any:
    return given[name].reshape(-1)[0] if name in given else default


def _text(given: Mapping[str, Array], name: str) -> Any:
    if name not in given:
        return None
    value = _one(given, name, 0)
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise ValueError(f"[request] {name}: not UTF-8 text") from error
    if len(text) > 100:
        raise ValueError(f"[request] {name}: {len(text)} letters are more than 100")
    return text
