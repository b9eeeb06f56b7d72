"""Fidelity: how far an artifact's volumes are from those of the float32 artifact that it stands for, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volcast.runtime.artifact import read_artifact
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.pipeline import Model
from volcast.runtime.request import Settings
from volcast.runtime.sizes import smallest_batch, whole
from volcast.runtime.spec import ArtifactSpec, Precision

from .frechet import frechet
from .similarity import ms_ssim, psnr
from .verification import Check, Verification, ms_ssim_budget

Volumes = NDArray[np.float32]

SAMPLES = 8


def fidelity(
    artifact: Path,
    reference: Path,
    *,
    engine: str = "auto",
    threads: int | None = None,
    samples: int = SAMPLES,
    steps: int | None = None,
    seed: int = 0,
    condition: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Compare the volumes of the artifact in the folder `artifact` with those of the float32 one in `reference`.

    Both draw `samples` volumes on the same engine from the same noise. MS-SSIM and PSNR compare volume by volume, the
    Fréchet distance (`frechet`) all of them at once. Its budget is the distance between two halves of the reference's
    own volumes: an artifact may not be further from the reference than other seeds are.

    Args:
        engine, threads: as in `volcast.load`.
        samples: 1..10000; with one there are no halves, and the Fréchet distance has no budget.
        steps, seed, condition, guidance: as in `Model.sample`.
        on_step: called with the steps done and to do, of both.

    Raises:
        ValueError: a bad artifact or argument, a reference that is not float32 or is another model.
    """
    spec, theirs = read_artifact(artifact), read_artifact(reference)
    _check_fit(spec, theirs)
    samples = whole(samples)
    if not isinstance(samples, int) or not 1 <= samples <= 10_000:
        raise ValueError(f"[verify] samples={samples}: need 1..10000")
    opened = open_engine(engine, threads)
    settings: Settings = {"steps": steps, "guidance": guidance}

    def draw(folder: Path, spec: ArtifactSpec, part: int) -> Volumes:
        def after(done: int, total: int) -> None:
            on_step(part * total + done, 2 * total)

        volumes = Model(folder, spec, opened).sample_many(
            samples, seed, batch=smallest_batch(spec), condition=condition, on_step=after, **settings
        )
        arrays = (np.asarray(volume.array, np.float32) for volume in volumes)
        rank = len(spec.latent_shape) - 1
        return np.stack([array if array.ndim > rank else array[None] for array in arrays])

    wanted = draw(reference, theirs, 0)
    checks = [_same_weights(spec, theirs)]
    try:
        found = draw(artifact, spec, 1)
    except ValueError as error:
        # The reference went through the same arguments: what is left are volumes that are not finite.
        checks += [Check(name="volumes", value=math.nan, budget=None, note=str(error))]
    else:
        checks += _volume_checks(found, wanted, ms_ssim_budget(spec.precision))
    guided = "" if guidance is None else f", guidance {guidance:g}"
    subject = (
        f"{spec.name}: {spec.precision} against fp32, both on {opened.name}, {samples} seeds from {seed}, "
        f"{steps or spec.scheduler.steps} {spec.scheduler.scheduler} steps{guided}"
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


def _same_weights(spec: ArtifactSpec, reference: ArtifactSpec) -> Check:
    keys = [key for key in reference.provenance if key.endswith("_sha256")]
    other = [key for key in keys if spec.provenance.get(key) != reference.provenance[key]]
    names = " and ".join(key.removesuffix("_sha256") for key in other)
    note = f"{names} came from other files: different models" if other else ""
    return Check(name="source files that differ", value=len(other), budget=0, note=note)


def _volume_checks(found: Volumes, wanted: Volumes, budget: float) -> list[Check]:
    pairs = [(found[i : i + 1], wanted[i : i + 1]) for i in range(len(wanted))]
    alike = [ms_ssim(*pair) for pair in pairs]
    signal = [psnr(*pair) for pair in pairs]
    half = len(wanted) // 2
    seeds = frechet(wanted[:half], wanted[half:]) if half else None
    # np.mean and np.min, because min() passes over NaN.
    return [
        Check(name="MS-SSIM, mean", value=float(np.mean(alike)), budget=budget, at_least=True),
        Check(name="MS-SSIM, worst", value=float(np.min(alike)), budget=None),
        Check(name="PSNR in dB, mean", value=float(np.mean(signal)), budget=None),
        Check(name="PSNR in dB, worst", value=float(np.min(signal)), budget=None),
        Check(name="Fréchet distance", value=frechet(found, wanted), budget=seeds),
    ]
