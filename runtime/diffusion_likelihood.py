"""How likely a diffusion model finds an image: the terms of its variational bound, for out-of-distribution detection.

Summed over the timesteps, in nats: KL(q(x_s | x_t, x0) || p(x_s | x_t)), s the timestep after t, and for the last one
-log p(x0 | x_t) of a bin of 1/255 around each value (arXiv:2006.11239 Eq. 5 without its constant first term; MONAI's
`get_likelihood`). Fewer timesteps than trained are a bound too, that of the model with these steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, final

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from .autoencoder import encode
from .denoiser import Denoiser
from .engine import Engine
from .inversion import Image, check_host, image_array
from .job import make_job
from .memory_limit import job_sizes
from .noise import request_noise
from .programs import Programs
from .request import OnStep, Settings, make_request
from .sampler import make_schedule
from .sampling import prepared, schedule_rows
from .spec import ArtifactSpec, SchedulerSpec

Array = NDArray[np.float64]
BIN = 1 / 255
"""Width of the bin of the last term: 8 bits of 0..1, as MONAI's default."""
NOISE_STEP = 2**32 - 2
"""Which of a sample's streams of noise: none that `Model.sample` draws, whose own samples would look too likely."""
_LEAST = 1e-12
"""A bin's probability is not taken for less: the last term ends at 27.6 nats."""


class Bounding(TypedDict, total=False):
    """Keyword arguments of `Model.likelihood`: `seed` of the noise, `condition`, and `steps`, `spacing`, `compat` as in
    `Model.sample`. `compat` gives the numbers of MONAI 1.6.1: the last term with a variance of 1e-20, and open bins
    beyond +-0.999.
    """

    seed: int
    condition: Mapping[str, Any] | None
    steps: int | None
    spacing: Literal["leading", "linspace", "trailing"] | None
    compat: Literal["monai-1.6"] | None


def bound_likelihood(
    spec: ArtifactSpec,
    engine: Engine,
    programs: Programs,
    image: Image,
    on_step: OnStep | None,
    how: Bounding,
) -> Array:
    """A lower bound of log p (natural) of one image, float64 `[1, C, D', H', W']`: the part of each value of its latent.

    Minus the sum of `likelihood_terms`; summed up it is low for images unlike those of training. `image` is as in
    `find_anomaly`.

    Raises:
        ValueError: anything out of range, an engine for a device, before the first step; values that are not finite.
    """
    check_host(engine, "likelihood")
    x0 = encode(spec, programs, image_array(spec, image, "likelihood"))
    return np.asarray(-likelihood_terms(spec, programs, x0, on_step, how).sum(0)[None])


def likelihood_terms(
    spec: ArtifactSpec, programs: Programs, x0: NDArray[np.float32], on_step: OnStep | None, how: Bounding
) -> Array:
    """The terms for one latent x0 `[1, C, D', H', W']`, float64 `[steps, C, D', H', W']`, the noisiest first, in nats.

    One draw of noise serves all timesteps, as in MONAI. ValueError: see `bound_likelihood`.
    """
    unknown = ", ".join(how.keys() - Bounding.__annotations__.keys())
    if unknown:
        raise ValueError(f"[likelihood] unknown {unknown}; known: {', '.join(Bounding.__annotations__)}")
    if spec.scheduler.prediction_type == "flow":
        raise ValueError(
            f"[likelihood] {spec.name} predicts a flow, which has no variational bound; use ddpm models"
        )
    settings: Settings = {
        "scheduler": "ddpm", "steps": how.get("steps"), "spacing": how.get("spacing"), "compat": how.get("compat"),
    }  # fmt: skip
    request = make_request(spec, how.get("seed", 0), settings)
    job = make_job(spec, request, 1, 1, how.get("condition"), x0.shape[2:])
    if programs.memory is not None:
        programs.memory.check(job_sizes(spec, job, 1))
    rows = schedule_rows(spec, programs, job)
    given = prepared(spec, programs, job.conditions(range(1)))
    shapes = {name: value.shape for name, value in given.items()}
    step = programs.open("step", {"x": x0.shape, "row": (1, *rows.shape[1:]), **shapes})
    network = Denoiser(step, rows, {_core.Branch.CONDITIONAL: given})
    noise = request_noise(request.seed, range(1), NOISE_STEP, x0.shape[1:]).astype(np.float64)
    clean = x0.astype(np.float64)
    bound = Bound(
        spec.scheduler, job.plan.timesteps.astype(np.int64), monai=request.sampler.compat is not None
    )
    terms = np.empty((len(job.plan), *x0.shape[1:]), np.float64)
    for place in range(len(job.plan)):
        signal, sigma = bound.levels(place)
        noisy = signal * clean + sigma * noise
        out = network(place, noisy.astype(np.float32), _core.Branch.CONDITIONAL).astype(np.float64)
        terms[place] = bound.term(place, clean, noisy, out)[0]
        if not np.isfinite(terms[place]).all():
            raise ValueError(
                f"[likelihood] the network's output at step {place} is not finite; check the weights and the precision"
            )
        if on_step is not None:
            on_step(place + 1, len(job.plan))
    return terms


@final
class Bound:
    """The terms at the timesteps `[steps]`, descending, of a model trained as `scheduler` says, in float64."""

    def __init__(self, scheduler: SchedulerSpec, timesteps: NDArray[np.int64], *, monai: bool) -> None:
        self._scheduler, self._monai = scheduler, monai
        levels = np.asarray(make_schedule(scheduler.noise_schedule).alphas_cumprod, np.float64)
        after = timesteps - 1 if monai else np.append(timesteps[1:], -1)
        self._now = levels[timesteps]
        self._next = np.where(after >= 0, levels[after], 1.0)
        beta = 1 - self._now / self._next
        posterior = (1 - self._next) / (1 - self._now) * beta
        self._last = after < 0
        if scheduler.variance_type == "fixed_large":
            variance = beta
        elif monai or len(timesteps) == 1:
            variance = np.maximum(posterior, 1e-20)
        else:  # that of the last transition is 0: the one before it stands in, as in arXiv:2102.09672
            variance = np.where(self._last, posterior[-2], posterior)
        self._variance = variance
        self._to_x0 = np.sqrt(self._next) * beta / (1 - self._now)
        self._to_x = np.sqrt(self._now / self._next) * (1 - self._next) / (1 - self._now)

    def levels(self, place: int) -> tuple[float, float]:
        """x_t = signal x0 + sigma noise."""
        return float(np.sqrt(self._now[place])), float(np.sqrt(1 - self._now[place]))

    def term(self, place: int, clean: Array, noisy: Array, out: Array) -> Array:
        """In nats, for every value of `clean`; `out` is the network's answer to `noisy`."""
        signal, sigma = self.levels(place)
        match self._scheduler.prediction_type:
            case "epsilon":
                x0 = (noisy - sigma * out) / signal
            case "sample":
                x0 = out
            case _:
                x0 = signal * noisy - sigma * out
        if self._scheduler.clip_sample:
            x0 = np.clip(x0, self._scheduler.clip_sample_min, self._scheduler.clip_sample_max)
        variance = self._variance[place]
        if not self._last[place]:
            # Both Gaussians have this variance, and the means differ by what they say of x0 alone.
            return np.asarray(0.5 * (self._to_x0[place] * (clean - x0)) ** 2 / variance)
        mean = self._to_x0[place] * x0 + self._to_x[place] * noisy
        return -_log_bin(clean, mean, np.sqrt(variance), tails=self._monai)


def _log_bin(value: Array, mean: Array, deviation: float, *, tails: bool) -> Array:
    """log of the normal probability of a bin around `value`; with `tails` the bins beyond +-0.999 are open."""
    above = _normal_cdf((value - mean + BIN / 2) / deviation)
    below = _normal_cdf((value - mean - BIN / 2) / deviation)
    inside = above - below
    if tails:
        inside = np.where(value < -0.999, above, np.where(value > 0.999, 1 - below, inside))
    return np.asarray(np.log(np.maximum(inside, _LEAST)))


def _normal_cdf(x: Array) -> Array:
    """Within 2e-4 (Page 1977), as in MONAI and improved-diffusion."""
    with np.errstate(over="ignore"):
        return np.asarray(0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
