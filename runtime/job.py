"""Job: a request resolved against an artifact. Nothing in it is left to check, and nothing has run yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from . import conditions
from .request import SAMPLES_OF_A_SEED, Request
from .sampler import make_plan
from .sizes import check_size, latent_sizes, whole
from .spec import ArtifactSpec

Array = NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Attributes:
    request: the settings.
    scheduler: the sampler's name.
    plan: its rows of coefficients.
    shape: the latent's `(C, *spatial)`.
    conditional: the conditions by name, without a batch axis, of each sample, or one for all.
    unconditional: the same for guidance's other branch; None without guidance.
    """

    request: Request
    scheduler: str
    plan: _core.Plan
    shape: tuple[int, ...]
    conditional: Sequence[Mapping[str, Array]]
    unconditional: Sequence[Mapping[str, Array]] | None


def make_job(
    spec: ArtifactSpec,
    request: Request,
    count: int,
    batch: int,
    condition: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    size: Sequence[int] | None,
) -> Job:
    """Check everything that can be checked without running a program.

    Raises:
        ValueError: see `Request`, `latent_sizes` and `conditions.resolve`; a batch that the artifact does not allow.
    """
    count, batch = whole(count), whole(batch)
    if not isinstance(count, int) or not 1 <= count <= SAMPLES_OF_A_SEED:
        raise ValueError(f"[sample] n={count!r}: need 1..{SAMPLES_OF_A_SEED}")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"[sample] batch={batch!r}: need 1 or more")
    spatial, sizes = latent_sizes(spec, size)
    if isinstance(condition, Sequence):
        if len(condition) != count:
            raise ValueError(
                f"[sample] {len(condition)} conditions for {count} samples: give one for all, or one for each"
            )
        resolved = [conditions.resolve(spec, each, sizes) for each in condition]
    else:
        resolved = [conditions.resolve(spec, condition, sizes)]
    if any(other.sizes != resolved[0].sizes for other in resolved):
        raise ValueError("[sample] the samples' conditions differ in shape; sample them one by one")
    unconditional = None
    if request.guidance is not None:
        unconditional = [conditions.unconditional(spec, each) for each in resolved]
    for axis in spec.axes:
        if axis.name == "batch":
            for part in {min(batch, count), count % batch or min(batch, count)}:
                check_size("sample", axis, part)
    shape = (spec.latent_shape[0], *spatial)
    return Job(
        request=request,
        scheduler=request.sampler.scheduler or spec.scheduler.scheduler,
        plan=make_plan(spec.scheduler, request.sampler, spatial),
        shape=shape,
        conditional=[each.values for each in resolved],
        unconditional=unconditional,
    )


def stack(values: Sequence[Mapping[str, Array]], part: range) -> dict[str, Array]:
    """The conditions of the samples `part`, each `[N, ...]`; `values` holds one for each sample, or one for all."""
    chosen = [values[i] for i in part] if len(values) > 1 else [values[0]] * len(part)
    return {name: np.stack([each[name] for each in chosen]) for name in chosen[0]}
