"""What a sample is asked for: settings, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Literal, TypedDict

from pydantic import Field, ValidationError

from .frozen import Finite, Frozen
from .sampler import Method, SamplerConfig
from .sizes import whole
from .spec import ArtifactSpec

SAMPLES_OF_A_SEED = 1_000_000
"""Sample i of a seed has i below this."""
MOST_WEIGHTS = 1000
"""Of one guidance sweep."""
OnStep = Callable[[int, int], None]
"""Called after each step with the steps done and to do, over all batches; what it raises stops the run."""


class Settings(TypedDict, total=False):
    """Keyword arguments of `Model.sample`: `SamplerConfig`'s and `Request`'s. Several weights of guidance are a sweep,
    which `Model.sample_many` takes.
    """

    steps: int | None
    scheduler: Method | None
    spacing: Literal["leading", "linspace", "trailing"] | None
    eta: float
    guidance: float | Iterable[float] | None
    strength: float
    label: int | None
    scale: float | None
    reuse: int
    compat: Literal["monai-1.6"] | None


class Request(Frozen):
    """Settings of one request.

    Attributes:
        sampler: which plan to run.
        seed: sample i of the request takes its noise from the key (seed, i).
        guidance: weight w of classifier-free guidance, u + w (c - u) (arXiv:2207.12598); None: the conditional branch
            alone, one network call a step instead of two.
        strength: how far an image is noised before it is denoised again; 1: from pure noise.
        label: class from 0 to which the gradient of the artifact's classifier pulls (`classifier.GuidedStep`), `scale` times;
            6 is usual (arXiv:2203.04306).
        reuse: k: the whole network runs at every k-th step alone (`reuse.ReusingDenoiser`); 1: at each.
    """

    sampler: SamplerConfig
    seed: Annotated[
        int, Field(ge=0, lt=2**64, strict=True, description=f"a whole number, 0..{2**64 - 1}")
    ] = 0
    guidance: Annotated[
        float | None,
        Field(ge=0, le=100, description="0..100, or leave it out for the conditional branch alone"),
    ] = None
    strength: Annotated[float, Field(gt=0, le=1, description="a number above 0 and up to 1")] = 1.0
    label: Annotated[int | None, Field(strict=True, description="a class, a whole number from 0")] = None
    scale: Annotated[Finite, Field(ge=0, le=1e6, description="0..1e6")] = 6.0
    reuse: Annotated[int, Field(ge=1, le=1000, strict=True, description="a whole number, 1..1000")] = 1


def split_sweep(spec: ArtifactSpec, seed: int, settings: Settings) -> tuple[tuple[float, ...], Settings]:
    """The weights of a guidance sweep (none: it is no sweep), and the settings with the first of them.

    Raises:
        ValueError: no weight or more than 1000, or what `make_request` raises for any of them.
    """
    given = settings.get("guidance")
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        return (), settings
    weights = tuple(given)
    if not 1 <= len(weights) <= MOST_WEIGHTS:
        raise ValueError(f"[sample] guidance: {len(weights)} weights: need 1..{MOST_WEIGHTS}")
    checked = [make_request(spec, seed, {**settings, "guidance": weight}).guidance for weight in weights]
    found = tuple(weight for weight in checked if weight is not None)
    if len(found) < len(weights):
        raise ValueError("[sample] guidance: None among the weights; 1 is the conditional branch alone")
    return found, {**settings, "guidance": found[0]}


def make_request(spec: ArtifactSpec, seed: int, settings: Settings) -> Request:
    """The request that `settings` describe, for the artifact `spec`.

    Raises:
        ValueError: an unknown setting or a value out of range, in one line.
    """
    known = Settings.__annotations__
    unknown = ", ".join(settings.keys() - known.keys())
    if unknown:
        raise ValueError(f"[sample] unknown setting {unknown}; known: {', '.join(known)}")
    last = spec.scheduler.noise_schedule.num_train_timesteps
    steps = whole(settings.get("steps"))
    steps = spec.scheduler.steps if steps is None else steps
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= last:
        raise ValueError(f"[sample] steps={steps!r}: need 1..{last}")
    own = {key: whole(value) for key, value in settings.items() if key in Request.model_fields}
    if settings.get("scale") is None:
        own.pop("scale", None)
    elif settings.get("label") is None:
        raise ValueError(
            f"[sample] scale={settings['scale']!r} without label: give label=CLASS too, or leave it out"
        )
    sampler = {key: value for key, value in settings.items() if key in SamplerConfig.model_fields}
    try:
        request = Request.model_validate({"seed": whole(seed), "sampler": {**sampler, "steps": steps}, **own})
        _check_label(spec, request.label)
        start = steps - max(1, math.floor(steps * request.strength + 1e-9))
        return request.model_copy(update={"sampler": request.sampler.model_copy(update={"start": start})})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][-1])
        field = (SamplerConfig.model_fields | Request.model_fields).get(name)
        need = first["msg"] if field is None or field.description is None else f"need {field.description}"
        raise ValueError(f"[sample] {name}={first['input']!r}: {need}") from error


def _check_label(spec: ArtifactSpec, label: int | None) -> None:
    """ValueError: a class, and the artifact has no classifier or not this class."""
    if label is None:
        return
    if "gradient" not in spec.programs:
        raise ValueError(
            f"[sample] label={label}: {spec.name} has no classifier; add one with `volcast classifier`"
        )
    classes = int(spec.programs["gradient"].outputs[1].shape[1])
    if not 0 <= label < classes:
        raise ValueError(f"[sample] label={label}: need 0..{classes - 1}")
    if spec.scheduler.prediction_type == "flow":
        raise ValueError(
            f"[sample] label={label}: {spec.name} predicts a flow, which has no alpha_bar; leave it out"
        )
