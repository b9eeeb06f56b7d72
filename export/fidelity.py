"""Fidelity: how far an artifact's volumes are from those of the float32 artifact that it stands for, seed by seed and as
a distribution; of fewer steps, from those of more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from volcast.runtime.artifact import read_artifact
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.job import make_job
from volcast.runtime.pipeline import Model
from volcast.runtime.quality import QualityBudget
from volcast.runtime.request import Settings, make_request
from volcast.runtime.sampler import Method
from volcast.runtime.sizes import smallest_batch, whole
from volcast.runtime.spec import ArtifactSpec, Precision
from volcast.runtime.volume import Volume

from .evaluation_flags import alikeness, low_diversity, pairs
from .evaluation_images import FEWEST, ImageSet, check_alike
from .frechet import feature_moments, frechet_of_moments
from .similarity import ms_ssim, psnr
from .verification import Check, Verification, ms_ssim_budget

Volumes = NDArray[np.float32]

SAMPLES = 8


@final
@dataclass(frozen=True, kw_only=True)
class SamplerChoice:
    """How volumes are drawn; None: as the artifact says. `reuse` as in `Model.sample`."""

    steps: int | None = None
    scheduler: Method | None = None
    reuse: int = 1

    def resolved(self, spec: ArtifactSpec) -> SamplerChoice:
        """With the artifact's own steps and scheduler where they are None."""
        own = spec.scheduler
        return self.filled(SamplerChoice(steps=own.steps, scheduler=own.scheduler))

    def filled(self, other: SamplerChoice) -> SamplerChoice:
        """With `other`'s steps and scheduler where its own are None."""
        steps = other.steps if self.steps is None else self.steps
        return replace(self, steps=steps, scheduler=self.scheduler or other.scheduler)

    def __str__(self) -> str:
        return f"{self.steps} {self.scheduler} steps" + (f", reuse {self.reuse}" if self.reuse != 1 else "")


def fidelity(
    artifact: Path,
    reference: Path,
    *,
    engine: str = "auto",
    threads: int | None = None,
    samples: int = SAMPLES,
    sampler: SamplerChoice = SamplerChoice(),
    reference_sampler: SamplerChoice | None = None,
    seed: int = 0,
    condition: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    real: ImageSet | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Compare the volumes of the artifact in the folder `artifact` with those of the float32 one in `reference`.

    Both draw `samples` volumes on the same engine from the same noise. MS-SSIM and PSNR compare volume by volume, where
    a seed means one volume: not where samplers that draw noise of their own take other steps. The Fréchet distance
    (`frechet`) and the diversity compare all of them at once, with `real` the distance from real images, too. The
    budget is the artifact's `quality`: by default it may not be further from the reference than other seeds are.

    Args:
        engine, threads: as in `volcast.load`.
        samples: 1..10000; the Fréchet distance has a budget from 2 on, diversity from 4.
        sampler, reference_sampler: of each; None: the reference's is `sampler` without reuse.
        seed, condition, guidance: as in `Model.sample`.
        real: images of the volumes' shape and voxel size.
        on_step: called with the steps done and to do, of both.

    Raises:
        ValueError: a bad artifact or argument, one volume where it would judge nothing, a reference that is not float32
            or is another model, real images of another shape.
    """
    spec, theirs = read_artifact(artifact), read_artifact(reference)
    _check_fit(spec, theirs)
    samples = whole(samples)
    if not isinstance(samples, int) or not 1 <= samples <= 10_000:
        raise ValueError(f"[verify] samples={samples}: need 1..10000")
    wanted_sampler = (reference_sampler or replace(sampler, reuse=1)).resolved(theirs)
    sampler = sampler.resolved(spec)
    quality = spec.quality or QualityBudget()
    same = sampler == wanted_sampler
    paired = same or "ddpm" not in (sampler.scheduler, wanted_sampler.scheduler)
    alike = (ms_ssim_budget(spec.precision) if same else None) if quality.ms_ssim is None else quality.ms_ssim
    if samples == 1 and (alike is None or not paired):
        raise ValueError("[verify] samples=1: one volume of each sampler judges nothing; need 2 or more")
    requests: list[Settings] = [
        {"steps": one.steps, "scheduler": one.scheduler, "reuse": one.reuse, "guidance": guidance}
        for one in (sampler, wanted_sampler)
    ]
    jobs = [
        make_job(each, make_request(each, seed, settings), samples, smallest_batch(each), condition, None)
        for each, settings in zip((spec, theirs), requests, strict=True)
    ]
    ours, before = (
        math.ceil(samples / smallest_batch(each)) * len(job.plan)
        for each, job in zip((spec, theirs), jobs, strict=True)
    )
    opened = open_engine(engine, threads)

    def sampled(folder: Path, spec: ArtifactSpec, settings: Settings, done_before: int) -> Iterator[Volume]:
        def after(done: int, total: int) -> None:
            on_step(done_before + done, before + ours)

        return Model(folder, spec, opened).sample_many(
            samples, seed, batch=smallest_batch(spec), condition=condition, on_step=after, **settings
        )

    # What either refuses, it refuses here: before the first volume of the other.
    found_volumes = sampled(artifact, spec, requests[0], before)
    wanted = _drawn(sampled(reference, theirs, requests[1], 0), theirs, real)
    checks = [_same_weights(spec, theirs)]
    try:
        found = _drawn(found_volumes, spec, real)
    except ValueError as error:
        # The reference went through the same arguments: what is left are volumes that are not finite.
        checks += [Check(name="volumes", value=math.nan, budget=None, note=str(error))]
    else:
        if paired:
            checks += _volume_checks(found, wanted, alike)
        checks += distribution_checks(found, wanted, real, quality, seed)
    guided = "" if guidance is None else f", guidance {guidance:g}"
    others = "" if sampler == wanted_sampler else f" against {wanted_sampler}"
    subject = (
        f"{spec.name}: {spec.precision} against fp32, both on {opened.name}, {samples} seeds from {seed}, "
        f"{sampler}{others}{guided}"
    )
    return Verification(subject=subject, checks=tuple(checks))


def _check_fit(spec: ArtifactSpec, reference: ArtifactSpec) -> None:
    if reference.precision is not Precision.FP32:
        raise ValueError(
            f"[verify] against {reference.name} in {reference.precision}: need the float32 artifact; export it with "
            "--precision fp32"
        )
    for fact in ("latent_shape", "conditions", "scheduler", "scale_factor"):
        ours, theirs = getattr(spec, fact), getattr(reference, fact)
        if ours != theirs:
            raise ValueError(
                f"[verify] {fact} of {spec.name!r} and of {reference.name!r} differ; give the float32 artifact of the "
                "same bundle"
            )


def _drawn(volumes: Iterable[Volume], spec: ArtifactSpec, real: ImageSet | None) -> Volumes:
    """`[N, C, ...]`; ValueError at the first of them if `real` are of another shape."""
    rank = len(spec.latent_shape) - 1
    found: list[Volumes] = []
    for volume in volumes:
        array = np.asarray(volume.array, np.float32)
        found.append(array if array.ndim > rank else array[None])
        if real is not None and len(found) == 1:
            check_alike(
                "verify", f"{spec.name}'s volume", array.shape[-rank:], volume.spacing_mm,
                real.folder, real.images.shape[2:], real.spacing_mm,
            )  # fmt: skip
    return np.stack(found)


def _same_weights(spec: ArtifactSpec, reference: ArtifactSpec) -> Check:
    keys = [key for key in reference.provenance if key.endswith("_sha256")]
    other = [key for key in keys if spec.provenance.get(key) != reference.provenance[key]]
    names = " and ".join(key.removesuffix("_sha256") for key in other)
    note = f"{names} came from other files: different models" if other else ""
    return Check(name="source files that differ", value=len(other), budget=0, note=note)


def _volume_checks(found: Volumes, wanted: Volumes, budget: float | None) -> list[Check]:
    both = [(found[i : i + 1], wanted[i : i + 1]) for i in range(len(wanted))]
    alike = [ms_ssim(*pair) for pair in both]
    signal = [psnr(*pair) for pair in both]
    # np.mean and np.min, because min() passes over NaN.
    return [
        Check(name="MS-SSIM, mean", value=float(np.mean(alike)), budget=budget, at_least=True),
        Check(name="MS-SSIM, worst", value=float(np.min(alike)), budget=None),
        Check(name="PSNR in dB, mean", value=float(np.mean(signal)), budget=None),
        Check(name="PSNR in dB, worst", value=float(np.min(signal)), budget=None),
    ]


def distribution_checks(
    found: Volumes, wanted: Volumes, real: ImageSet | None, quality: QualityBudget, seed: int
) -> list[Check]:
    """Of volumes `[N, C, ...]` of which no two belong together; `seed` draws the pairs that diversity is told by."""
    sets = [found, wanted] if real is None else [found, wanted, real.images]
    ours, theirs, *others = (feature_moments(each, each.shape[2:]) for each in sets)
    half = len(wanted) // 2
    rows = np.arange(len(wanted))
    seeds = frechet_of_moments(theirs.of(rows[:half]), theirs.of(rows[half:])) if half else None
    checks = [
        Check(
            name="Fréchet distance",
            value=frechet_of_moments(ours, theirs),
            budget=None if seeds is None else quality.frechet * seeds,
        )
    ]
    for other in others:
        budget = quality.real * frechet_of_moments(theirs, other)
        name = "Fréchet distance, real images"
        checks.append(Check(name=name, value=frechet_of_moments(ours, other), budget=budget))
    if len(wanted) >= FEWEST:
        chosen = pairs(len(wanted), np.random.default_rng(seed))
        peak = float(wanted.max()) - float(wanted.min())
        flag = low_diversity(*(alikeness(each, chosen, peak) for each in (found, wanted)))
        share = quality.diversity
        checks.append(
            Check(name="diversity over the reference's", value=flag.value, budget=share, at_least=True)
        )
    return checks
