"""evaluate: how samples compare with real images, by MONAI's metrics, and whether they repeat these or themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from monai.metrics.mmd import MMDMetric
from numpy.typing import NDArray

from .evaluation_flags import (
    Flag,
    alikeness,
    inner_products,
    low_diversity,
    memorisation,
    nearest,
    pairs,
)
from .evaluation_images import ImageSet, check_alike
from .evaluation_interval import half_sample_interval
from .frechet import feature_moments, frechet_of_moments
from .similarity import ms_ssim, psnr, ssim

Array = NDArray[np.float64]

STAGES = ("Fréchet distance", "MMD", "diversity", "pairs")
"""What `evaluate` does one after another."""


@final
@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric's value and its 95 % interval, which is None where there is none; `note` says what it is of."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `value` is null where it is infinite."""
        value = self.value if math.isfinite(self.value) else None
        return {"name": self.name, "value": value, "interval": self.interval, "note": self.note}


@final
@dataclass(frozen=True, kw_only=True)
class Spread:
    """What the flags stand on, to plot: root mean square differences and MS-SSIM of pairs."""

    to_real: Array
    among_real: Array
    alike_samples: Array
    alike_real: Array
    nearest: tuple[tuple[str, str], ...]
    """Of each sample, its name and that of the real image next to it."""


@final
@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found; `subject` says in words what was compared."""

    subject: str
    scores: tuple[Score, ...]
    flags: tuple[Flag, ...]
    spread: Spread = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        each = zip(self.spread.nearest, self.spread.to_real, strict=True)
        return {
            "subject": self.subject,
            "scores": [score.as_dict() for score in self.scores],
            "flags": [flag.as_dict() for flag in self.flags],
            "nearest": [{"sample": a, "real": b, "distance": float(d)} for (a, b), d in each],
        }

    def as_text(self) -> str:
        """A table, one metric a line, and the flags."""
        width = max(len(score.name) for score in self.scores)
        lines = [self.subject, f"{'metric':<{width}} {'value':>9}  95 % interval"]
        for score in self.scores:
            between = "" if score.interval is None else "{:.3g} .. {:.3g}".format(*score.interval)
            lines.append(f"{score.name:<{width}} {score.value:>9.4g}  {between:<20} {score.note}".rstrip())
        lines += [f"{flag.name}: {'FLAGGED: ' if flag.raised else 'no: '}{flag.text}" for flag in self.flags]
        return "\n".join(lines)


def evaluate(
    samples: ImageSet, real: ImageSet, seed: int = 0, on_stage: Callable[[str], object] = lambda stage: None
) -> Evaluation:
    """Compare `samples` with `real`; equal arguments give equal numbers.

    Args:
        seed: 0 or more; draws the halves that intervals stand on, and pairs where there are too many.
        on_stage: told each of `STAGES` that begins.

    Raises:
        ValueError: images of other shapes or voxel sizes, or a metric's limit (4 voxels an axis).
    """
    if seed < 0:
        raise ValueError(f"[evaluate] seed={seed}: need 0 or more")
    check_alike(
        "evaluate", samples.folder, samples.images.shape[2:], samples.spacing_mm,
        real.folder, real.images.shape[2:], real.spacing_mm,
    )  # fmt: skip
    if samples.images.shape[1] != real.images.shape[1]:
        raise ValueError(
            f"[evaluate] {samples.folder} has {samples.images.shape[1]} channels, {real.folder} {real.images.shape[1]}"
        )
    peak = float(real.images.max()) - float(real.images.min())
    if peak == 0:
        raise ValueError(
            f"[evaluate] every voxel of {real.folder} is {real.images.flat[0]:g}: nothing to compare with"
        )
    generator = np.random.default_rng(seed)
    on_stage(STAGES[0])
    scores = [*_frechet(samples, real, generator)]
    on_stage(STAGES[1])
    both = inner_products(np.concatenate((samples.images, real.images)))
    scores.append(_mmd(both, len(samples.names), generator))
    to_real, among, place = nearest(both, len(samples.names))
    on_stage(STAGES[2])
    alike = []
    for words, each in (("two samples", samples), ("two real images", real)):
        chosen = pairs(len(each.names), generator)
        alike.append(alikeness(each.images, chosen, peak))
        scores.append(_pairwise(words, alike[-1], chosen, len(each.names), generator))
    on_stage(STAGES[3])
    paired = [
        (samples.names.index(name), real.names.index(name)) for name in samples.names if name in real.names
    ]
    scores += _paired(samples, real, paired, peak, generator)
    names = (
        f"{len(paired)} pairs by name"
        if paired
        else "no names in common: PSNR, SSIM and MS-SSIM of pairs left out"
    )
    shape = " x ".join(map(str, samples.images.shape[2:]))
    return Evaluation(
        subject=f"{len(samples.names)} samples and {len(real.names)} real images of {shape}, {names}",
        scores=tuple(scores),
        flags=(memorisation(to_real, among), low_diversity(*alike)),
        spread=Spread(
            to_real=to_real, among_real=among, alike_samples=alike[0], alike_real=alike[1],
            nearest=tuple((a, real.names[b]) for a, b in zip(samples.names, place, strict=True)),
        ),
    )  # fmt: skip


def _frechet(samples: ImageSet, real: ImageSet, generator: np.random.Generator) -> list[Score]:
    ours, theirs = (feature_moments(each.images, each.images.shape[2:]) for each in (samples, real))
    sizes = len(samples.names), len(real.names)
    value = frechet_of_moments(ours, theirs)
    interval = half_sample_interval(
        lambda a, b: frechet_of_moments(ours.of(a), theirs.of(b)), sizes, value, generator
    )
    order = generator.permutation(sizes[1])
    halves = (theirs.of(order[: sizes[1] // 2]), theirs.of(order[sizes[1] // 2 :]))
    return [
        Score(name="Fréchet distance", value=value, interval=interval, note="on volcast's fixed features"),
        Score(name="Fréchet, real halves", value=frechet_of_moments(*halves), note="one half of the real images from the other"),
    ]  # fmt: skip


def _mmd(products: Array, samples: int, generator: np.random.Generator) -> Score:
    """MONAI's metric has a linear kernel, so it is the same on any vectors with the images' inner products."""
    values, vectors = np.linalg.eigh(products)
    vectors = vectors * np.sqrt(np.maximum(values, 0))
    ours, theirs = torch.from_numpy(vectors[:samples]), torch.from_numpy(vectors[samples:])
    n = min(len(ours), len(theirs))
    metric = MMDMetric()

    def mmd(a: NDArray[np.intp], b: NDArray[np.intp]) -> float:
        count = min(len(a), len(b))  # MONAI wants as many of each
        return float(metric(theirs[b[:count]], ours[a[:count]]))

    value = mmd(generator.permutation(len(ours)), generator.permutation(len(theirs)))
    interval = half_sample_interval(mmd, (len(ours), len(theirs)), value, generator)
    note = "unbiased, of voxels: may fall below 0"
    if len(ours) != len(theirs):
        note += f"; of {n} images a side, drawn"
    return Score(name="MMD", value=value, interval=interval, note=note)


def _pairwise(
    words: str, alike: Array, chosen: NDArray[np.intp], images: int, generator: np.random.Generator
) -> Score:
    def mean(rows: NDArray[np.intp]) -> float:
        inside = np.isin(chosen, rows).all(axis=1)
        return float(alike[inside].mean()) if inside.any() else math.nan

    value = float(alike.mean())
    interval = half_sample_interval(mean, (images,), value, generator)
    return Score(
        name=f"MS-SSIM, {words}", value=value, interval=interval, note=f"mean of {len(chosen)} pairs"
    )


def _paired(
    samples: ImageSet, real: ImageSet, paired: Sequence[tuple[int, int]], peak: float, generator: np.random.Generator
) -> list[Score]:  # fmt: skip
    if not paired:
        return []
    scores = []
    for name, metric in (("PSNR in dB", psnr), ("SSIM", ssim), ("MS-SSIM", ms_ssim)):
        found = np.array([metric(samples.images[i : i + 1], real.images[j : j + 1], peak) for i, j in paired])
        value = float(found.mean())
        interval = None
        if len(found) > 1:
            interval = half_sample_interval(
                lambda rows, found=found: float(found[rows].mean()), (len(found),), value, generator
            )
        scores.append(Score(name=f"{name}, pairs", value=value, interval=interval, note=f"mean of {len(found)}, by name"))  # fmt: skip
    return scores
