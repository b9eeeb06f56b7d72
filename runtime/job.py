"""Job: a request resolved against an artifact. Nothing in it is left to check, and nothing has run yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from . import conditions
from .inpaint import Known
from .intensity import IntensitySpec
from .low_res import low_res_size, noised_low_res, with_channels
from .request import SAMPLES_OF_A_SEED, Request
from .sampler import make_plan
from .sizes import check_size, latent_sizes, whole
from .spec import ArtifactSpec, LowResSpec

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
    weights: of a guidance sweep, else empty. With k of them volume v of the job is sample v // k at weight v % k.
    low_res, intensity: an upscaler's; the low-resolution images of `conditional` and `unconditional` have no noise yet,
        and the intensities of volumes.
    known: what stays of an image, where the plan inpaints; else None.
    """

    request: Request
    scheduler: str
    plan: _core.Plan
    shape: tuple[int, ...]
    conditional: Sequence[Mapping[str, Array]]
    unconditional: Sequence[Mapping[str, Array]] | None
    weights: tuple[float, ...] = ()
    known: Known | None = None
    low_res: LowResSpec | None = None
    intensity: IntensitySpec | None = None

    @property
    def alike(self) -> bool:
        """Whether every volume has the same conditions."""
        return len(self.conditional) == 1 and self.low_res is None

    def samples(self, part: range) -> NDArray[np.uint64]:
        """The number of the sample that each volume of `part` is of: what its noise is drawn by."""
        return np.arange(part.start, part.stop, dtype=np.uint64) // np.uint64(len(self.weights) or 1)

    def guidance(self, part: range) -> float | tuple[float, ...] | None:
        """The weight of guidance of the volumes `part`, or one each where they differ."""
        if not self.weights:
            return self.request.guidance
        each = tuple(self.weights[i % len(self.weights)] for i in part)
        return each[0] if len(set(each)) == 1 else each

    def conditions(self, part: range) -> dict[str, Array]:
        """The conditions of the volumes `part`, each `[N, ...]`."""
        return self._stacked(self.conditional, part)

    def negative(self, part: range) -> dict[str, Array] | None:
        """The same for guidance's other branch; None without guidance."""
        return None if self.unconditional is None else self._stacked(self.unconditional, part)

    def _stacked(self, values: Sequence[Mapping[str, Array]], part: range) -> dict[str, Array]:
        samples = self.samples(part)
        stacked = stack(values, [int(i) for i in samples])
        if self.low_res is None:
            return stacked
        return noised_low_res(self.low_res, self.intensity, stacked, self.request.seed, samples)


def make_job(
    spec: ArtifactSpec,
    request: Request,
    count: int,
    batch: int,
    condition: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    size: Sequence[int] | None,
    negative: Mapping[str, Any] | None = None,
    weights: tuple[float, ...] = (),
) -> Job:
    """Check everything that can be checked without running a program.

    `negative`: values that take the place of the unconditional ones; `weights`: as `Job` says, `count` samples of each.

    Raises:
        ValueError: see `Request`, `latent_sizes` and `conditions.resolve`; a batch that the artifact does not allow.
    """
    count, batch = whole(count), whole(batch)
    if not isinstance(count, int) or not 1 <= count <= SAMPLES_OF_A_SEED:
        raise ValueError(f"[sample] n={count!r}: need 1..{SAMPLES_OF_A_SEED}")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"[sample] batch={batch!r}: need 1 or more")
    if spec.low_res is not None:
        negative = with_channels(spec, negative)
        if isinstance(condition, Sequence):
            condition = [with_channels(spec, each) for each in condition]
        else:
            condition = with_channels(spec, condition)
        size = low_res_size(spec, condition) if size is None else size
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
        unconditional = [conditions.unconditional(spec, each, negative) for each in resolved]
    elif negative:
        raise ValueError(
            "[sample] negative without guidance: give guidance=WEIGHT too, or leave negative out"
        )
    volumes = count * (len(weights) or 1)
    for axis in spec.axes:
        if axis.name == "batch":
            for part in {min(batch, volumes), volumes % batch or min(batch, volumes)}:
                check_size("sample", axis, part)
    shape = (spec.latent_shape[0], *spatial)
    if request.label is not None and shape != spec.programs["gradient"].inputs[0].shape[1:]:
        raise ValueError(
            f"[classifier] the latent is {shape}: the classifier takes {spec.programs['gradient'].inputs[0].shape[1:]} "
            "alone; leave size or label out"
        )
    return Job(
        request=request,
        scheduler=request.sampler.scheduler or spec.scheduler.scheduler,
        plan=make_plan(spec.scheduler, request.sampler, spatial),
        shape=shape,
        conditional=[each.values for each in resolved],
        unconditional=unconditional,
        weights=weights,
        low_res=spec.low_res,
        intensity=spec.intensity,
    )


def stack(values: Sequence[Mapping[str, Array]], samples: Sequence[int]) -> dict[str, Array]:
    """The conditions of the samples `samples`, each `[N, ...]`; `values` holds one for each sample, or one for all."""
    chosen = [values[i] for i in samples] if len(values) > 1 else [values[0]] * len(samples)
    return {name: np.stack([each[name] for each in chosen]) for name in chosen[0]}
