"""Sampling plans for an artifact: what its network was trained with, combined with what a request asks for.

A plan is a table of coefficients (csrc/plan.hpp); `volcast._core.run` runs any of them.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from volcast import _core

from .frozen import Finite, Frozen
from .spec import NoiseSchedule, SchedulerSpec

Method = Literal["ddim", "ddpm", "pndm", "dpm-solver++", "rflow"]


class SamplerConfig(Frozen):
    """What a request may choose; None: as the artifact says.

    `start` skips that many steps at the noisy end (image to image: begin from `noised(plan, x0, noise)`).
    `reverse` runs the same DDIM steps backwards, from x0 to noise (inversion). `compat="monai-1.6"` gives MONAI
    1.6.1's own numbers, faults included, and its own spacing. `eta` is DDIM's (arXiv:2010.02502 Eq. 16).
    """

    scheduler: Method | None = None
    steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    spacing: Literal["leading", "linspace", "trailing"] | None = None
    start: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    eta: Annotated[Finite, Field(ge=0, le=1, description="0..1")] = 0.0
    reverse: bool = False
    compat: Literal["monai-1.6"] | None = None


def make_schedule(noise: NoiseSchedule) -> _core.Schedule:
    """The betas of training in float64, `[num_train_timesteps]`."""
    train, start, end = noise.num_train_timesteps, noise.beta_start, noise.beta_end
    match noise.schedule:
        case "linear_beta":
            return _core.linear_beta(train, start, end)
        case "scaled_linear_beta":
            return _core.scaled_linear_beta(train, start, end)
        case "sigmoid_beta":
            return _core.sigmoid_beta(train, start, end, noise.sig_range)
        case "cosine":
            return _core.cosine(train, noise.s)


def make_plan(spec: SchedulerSpec, config: SamplerConfig, latent_spatial: tuple[int, ...]) -> _core.Plan:
    """The plan for a network trained as `spec` says, sampled as `config` asks.

    `latent_spatial` is the latent's spatial shape (D, H, W) or (H, W); only rflow's timestep transform reads it.
    Raises ValueError for a method that does not fit the network and for numbers out of range.
    """
    method = config.scheduler or spec.scheduler
    if (method == "rflow") != (spec.prediction_type == "flow"):
        raise ValueError(
            f"[sampler] scheduler {method!r} cannot sample a network trained with prediction_type "
            f"{spec.prediction_type!r}: 'rflow' and 'flow' belong together"
        )
    if method != "ddim" and (config.eta != 0 or config.reverse):
        raise ValueError(
            f"[sampler] {'reverse' if config.reverse else f'eta={config.eta:g}'}: {method} has none; leave it out, or take ddim"
        )
    if config.spacing and (config.compat or method == "rflow"):
        raise ValueError(
            f"[sampler] spacing={config.spacing!r}: {config.compat or method} has its own; drop it"
        )
    if method == "rflow":
        return _rflow(spec, config, latent_spatial)
    return _diffusion(method, spec, config)


def _rflow(spec: SchedulerSpec, config: SamplerConfig, latent_spatial: tuple[int, ...]) -> _core.Plan:
    return _core.make_rflow(
        config.steps or spec.steps,
        train_timesteps=spec.noise_schedule.num_train_timesteps,
        steps_offset=spec.steps_offset,
        start=config.start,
        use_discrete_timesteps=spec.use_discrete_timesteps,
        use_timestep_transform=spec.use_timestep_transform,
        input_img_size_numel=math.prod(latent_spatial),
        base_img_size_numel=spec.base_img_size_numel,
        spatial_dim=len(latent_spatial),
        monai=config.compat is not None,
    )


def _diffusion(method: Method, spec: SchedulerSpec, config: SamplerConfig) -> _core.Plan:
    schedule = make_schedule(spec.noise_schedule)
    steps = _core.Steps(
        config.steps or spec.steps,
        # On data N(.3, .25^2) with the exact denoiser, DDIM's std is .140 .177 .213 at 10, 20, 50 steps (leading
        # .146 .180 .213, trailing .117 .156 .197), and unlike leading it starts at T-1 for every step count.
        spacing=_core.Spacing[(config.spacing or "linspace").upper()],
        steps_offset=spec.steps_offset,
        start=config.start,
        set_alpha_to_one=spec.set_alpha_to_one,
        monai=config.compat is not None,
    )
    prediction = _core.Prediction[spec.prediction_type.upper()]
    clip = (spec.clip_sample_min, spec.clip_sample_max) if spec.clip_sample else None
    match method:
        case "ddim":
            return _core.make_ddim(
                schedule, steps, prediction, clip=clip, eta=config.eta, reverse=config.reverse
            )
        case "ddpm":
            variance = _core.Variance[spec.variance_type.upper()]
            return _core.make_ddpm(schedule, steps, prediction, clip=clip, variance=variance)
        case "pndm":
            return _core.make_pndm(schedule, steps, prediction, skip_prk_steps=spec.skip_prk_steps)
        case _:
            return _core.make_dpm_solver(schedule, steps, prediction, clip=clip)


def noised(plan: _core.Plan, x0: NDArray[Any], noise: NDArray[Any], row: int = 0) -> NDArray[Any]:
    """x0 `[N, C, D, H, W]` brought to the noise level at which row `row` of the plan starts.

    signal * x0 + sigma * noise with the row's own numbers: sqrt(alpha_bar) and sqrt(1 - alpha_bar), or 1 - t/T and
    t/T for rflow. The result is contiguous and has x0's dtype.
    """
    if x0.shape != noise.shape:
        raise ValueError(f"[noised] noise {noise.shape} is not of x0's shape {x0.shape}")
    if not 0 <= row < len(plan):
        raise ValueError(f"[noised] row={row}: need 0..{len(plan) - 1}")
    at = plan.rows[row]
    mixed = at["signal"] * x0.astype(np.float64) + at["sigma"] * noise.astype(np.float64)
    return np.ascontiguousarray(mixed, dtype=x0.dtype)
