"""A request to a served model, read off its tensors and checked as far as no program must run for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from .inpaint import MOST_CALLS, Inpaint
from .interface import (
    FORMATS,
    MOST_ROWS,
    MOST_SAMPLES,
    NEGATIVE,
    Array,
    Format,
    Tensor,
    inputs,
    text_of,
)
from .request import SAMPLES_OF_A_SEED, Settings, make_request, split_sweep
from .spec import ArtifactSpec, Manifest
from .token_choice import Choice, ChoiceSettings
from .token_spec import TokenSpec

MOST_STEPS = 1_000_000


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
    inpaint: Inpaint | None = None
    if isinstance(spec, ArtifactSpec):
        weights, settings = split_sweep(spec, seed or 0, settings)
        sampler = make_request(spec, seed or 0, settings).sampler
        volumes = samples * (len(weights) or 1)
        if volumes > MOST_SAMPLES:
            raise ValueError(
                f"[request] guidance: {samples} samples at {len(weights)} weights are {volumes} volumes: need "
                f"1..{MOST_SAMPLES}"
            )
        inpaint = _inpaint(given)
        if inpaint is not None:
            _check_rows((sampler.steps or spec.scheduler.steps) - sampler.start, inpaint, volumes)
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
        inpaint=inpaint,
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
            weights = [float(weight) for weight in given["guidance"]]
            found["guidance"] = weights if len(weights) > 1 else weights[0]
        if "strength" in given:
            found["strength"] = float(given["strength"][0])
        return found
    chosen = {name: given[name][0].item() for name in ChoiceSettings.__annotations__ if name in given}
    if isinstance(spec, TokenSpec):
        Choice(**chosen).check(spec.num_codes)
    return chosen


def _inpaint(given: Mapping[str, Array]) -> Inpaint | None:
    names = [name for name in given if name.startswith("inpaint_")]
    if not names:
        return None
    if "inpaint_mask" not in given:
        raise ValueError(f"[request] {', '.join(names)} without inpaint_mask: give it, or leave these out")
    resamples = _whole(given, "inpaint_resamples", Inpaint.resamples, 1, 1000)
    jump = _whole(given, "inpaint_jump_length", Inpaint.jump_length, 1, MOST_CALLS)
    paste = bool(_whole(given, "inpaint_paste", int(Inpaint.paste), 0, 1))
    return Inpaint(given["inpaint_mask"], resamples, jump, paste)


def _check_rows(steps: int, inpaint: Inpaint, volumes: int) -> None:
    """ValueError: each volume may have so many steps, and all together not."""
    each = steps * inpaint.resamples
    if each <= MOST_CALLS and volumes * each > MOST_ROWS:
        raise ValueError(
            f"[request] inpaint: {volumes} volumes of {each} steps: need {MOST_ROWS} or fewer in all; ask for "
            f"{MOST_ROWS // each} volumes at once"
        )


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
    """The number that was written, of which `value` is the nearest float32: 0.9 and not 0.89999998, whose bits would not
    be those of `Model.sample`."""
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
