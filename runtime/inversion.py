"""Anomaly maps: an image is taken to noise by DDIM backwards and back under a condition of health, |x - x_hat| is left.

Inversion is DDIM's ordinary differential equation run backwards (arXiv:2010.02502 section 4.3), so that the noise codes
this very image; on the way back classifier-free guidance (Sanchez et al. 2022, arXiv:2207.12268) or the gradient of a
classifier (Wolleb et al. 2022, arXiv:2203.04306) pulls it to health. Each timestep is the one that the plan says, both
ways: MONAI's notebook shows its network the number of the step instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, final

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from . import conditions
from .autoencoder import decode, decoder_conditions, encode
from .classifier import check_classifier
from .engine import Engine
from .frame import fitted
from .job import Job, make_job
from .memory_limit import job_sizes
from .programs import Programs
from .request import OnStep, Request, Settings, make_request
from .sampler import make_plan
from .sampling import HostLoop, Start, prepared_branches, schedule_rows
from .sizes import latent_sizes
from .spec import ArtifactSpec
from .volume import Volume, centred_affine

Array = NDArray[np.generic]
Latent = NDArray[np.float32]
Condition = Mapping[str, Any]
Image = Volume | NDArray[np.generic]


class Inversion(TypedDict, total=False):
    """Keyword arguments of `Model.anomaly`.

    `condition`: of health, values by the name of a condition or field, for the way back. `observed`: the same on the way
    to noise; None: the null context where the model has one, else `condition`. `steps`, `spacing` and, of the way back,
    `guidance`, `label` and `scale` as in `Model.sample`; `strength`: what part of the steps, from the clean end, is gone;
    left out: 0.5.
    """

    condition: Condition | None
    observed: Condition | None
    steps: int | None
    spacing: Literal["leading", "linspace", "trailing"] | None
    strength: float
    guidance: float | None
    label: int | None
    scale: float | None


@final
@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """What `find_anomaly` found.

    Attributes:
        map: |x - x_hat|, in the image's intensities, shape and affine.
        reconstruction: x_hat.
        latent: float32 `[1, C, D', H', W']`, the noise that codes the image, at the noisiest step of the way.
        steps: how many there were each way.
    """

    map: Volume
    reconstruction: Volume
    latent: Latent
    steps: int


def find_anomaly(
    spec: ArtifactSpec,
    engine: Engine,
    programs: Programs,
    image: Image,
    on_step: OnStep | None,
    how: Inversion,
) -> Anomaly:
    """What is unlike health in one image: it is taken to noise by DDIM backwards and back under a condition of health.

    `image` is one image, `[D, H, W]` or `[C, D, H, W]`, with the intensities of training; the maps lie where a Volume
    does. `on_step` is called with the steps done and to do, both ways together.

    Raises:
        ValueError: anything out of range, an engine for a device, before the first step; values that are not finite.
    """
    unknown = ", ".join(how.keys() - Inversion.__annotations__.keys())
    if unknown:
        raise ValueError(f"[anomaly] unknown {unknown}; known: {', '.join(Inversion.__annotations__)}")
    check_host(engine, "anomaly")
    if spec.low_res is not None:
        raise ValueError(f"[anomaly] {spec.name} is an upscaler; give a model of whole images")
    pixels = image_array(spec, image, "anomaly")
    condition, observed = how.get("condition"), how.get("observed")
    settings: Settings = {
        "scheduler": "ddim", "steps": how.get("steps"), "spacing": how.get("spacing"),
        "strength": how.get("strength", 0.5), "guidance": how.get("guidance"), "label": how.get("label"),
        "scale": how.get("scale"),
    }  # fmt: skip
    request = make_request(spec, 0, settings)
    check_classifier(request, engine, limited=programs.memory is not None)
    x = encode(spec, programs, pixels).copy()  # of a model of images it is the image itself
    forth = make_job(spec, request, 1, 1, condition, x.shape[2:])
    if programs.memory is not None:
        programs.memory.check(job_sizes(spec, forth, 1))
    plain = request.model_copy(update={"guidance": None, "label": None})
    back = replace(
        forth, request=plain, plan=_inverse(spec, plain, x.shape[2:]), unconditional=None,
        conditional=[_observed(spec, condition, observed, x.shape[2:])],
    )  # fmt: skip

    def after(before: int) -> Callable[[int, int], None]:
        def report(done: int, _: int) -> None:
            if on_step is not None:
                on_step(before + done, len(back.plan) + len(forth.plan))

        return report

    _run(spec, programs, back, x, after(0))
    latent = x.copy()
    _run(spec, programs, forth, x, after(len(back.plan)))
    found = decode(spec, programs, x, decoder_conditions(spec, forth, range(1)))[0]
    given = pixels[0]
    if found.shape != given.shape:
        raise ValueError(
            f"[anomaly] the model decodes to {found.shape}, the image is {given.shape}: export another model"
        )
    like = image if isinstance(image, Volume) else None
    return Anomaly(
        map=_volume(spec, np.abs(given - found), like), reconstruction=_volume(spec, found, like), latent=latent,
        steps=len(back.plan),
    )  # fmt: skip


def image_array(
    spec: ArtifactSpec, image: Volume | NDArray[np.generic], operation: str
) -> NDArray[np.float32]:
    """One image as float32 `[1, C, D, H, W]`: given so, without N, without C, or for a 2D model as a volume of one slice.

    Raises ValueError for another shape, several images, what is no finite number.
    """
    array = np.asarray(fitted(f"[{operation}] the image", image, spec))
    rank = len(spec.latent_shape) - 1
    channels = spec.latent_shape[0]
    if "encode" in spec.programs:
        channels = int(spec.programs["encode"].inputs[0].shape[1])
    given = array.shape
    array = array[None] if array.ndim == rank else array
    array = array[None] if array.ndim == rank + 1 else array
    if array.ndim != rank + 2 or array.shape[:2] != (1, channels) or array.dtype.kind not in "fiub":
        axes = ", ".join("DHW"[:rank])
        raise ValueError(
            f"[{operation}] the image is {array.dtype} {given}: need numbers, ({channels}, {axes})"
            + (f" or ({axes})" if channels == 1 else "")
        )
    if not np.isfinite(array).all():
        raise ValueError(f"[{operation}] the image holds NaN or infinity; give finite numbers")
    return np.ascontiguousarray(array, np.float32)


def check_host(engine: Engine, operation: str) -> None:
    """ValueError: an engine with a loop of its own, which knows no other network calls than `sample`'s."""
    if type(engine).sampler is not Engine.sampler:
        raise ValueError(
            f"[{operation}] {engine.name}: runs on the CPU engines; load with engine='openvino' or 'onnxruntime'"
        )


def _inverse(spec: ArtifactSpec, request: Request, size: tuple[int, ...]) -> _core.Plan:
    """The same transitions backwards; clipping x0 has no inverse."""
    unclipped = spec.scheduler.model_copy(update={"clip_sample": False})
    return make_plan(unclipped, request.sampler.model_copy(update={"reverse": True}), size)


def _observed(
    spec: ArtifactSpec, condition: Condition | None, observed: Condition | None, size: tuple[int, ...]
) -> Mapping[str, Array]:
    """What the network is shown on the way to noise: `observed`, else the null context, else `condition`."""
    _, sizes = latent_sizes(spec, size, "anomaly")
    if observed is not None:
        return conditions.resolve(spec, observed, sizes).values
    resolved = conditions.resolve(spec, condition, sizes)
    null = any(one.unconditional is not None for one in spec.conditions)
    return conditions.unconditional(spec, resolved) if null else resolved.values


def _run(
    spec: ArtifactSpec, programs: Programs, job: Job, x: Latent, after: Callable[[int, int], None]
) -> None:
    """Carry the job's plan out on `x` `[1, C, D', H', W']`, in place."""
    seeds, samples, rows = np.zeros(1, np.uint64), np.zeros(1, np.uint64), schedule_rows(spec, programs, job)
    branches = prepared_branches(spec, programs, job, range(1))
    start = Start(
        plan=job.plan,
        x=x,
        rows=rows,
        branches=branches,
        seeds=seeds,
        samples=samples,
        guidance=job.request.guidance,
    )
    HostLoop(programs).run(start, after, shows=False)


def _volume(spec: ArtifactSpec, channels: NDArray[np.float32], like: Volume | None) -> Volume:
    """`[C, D, H, W]` where `like` lies, or centred."""
    array = np.ascontiguousarray(channels[0] if channels.shape[0] == 1 else channels)
    if like is None:
        return Volume(array, centred_affine(channels.shape[1:], spec.spacing_mm), spec.spacing_mm)
    if len(like.spacing_mm) > len(spec.spacing_mm):  # one slice of a 2D model
        array = array[..., None]
    return Volume(array, like.affine, like.spacing_mm)
