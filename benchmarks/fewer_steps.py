"""How few steps are enough? Every scheduler and number of steps against 1000 steps of DDPM, as distributions.

    python -m volcast.benchmarks.fewer_steps FOLDER [--volumes 32] [--real IMAGES] [-o results/fewer_steps.jsonl]

Volumes are kept in FOLDER, so that the same command goes on where it was stopped. The Fréchet distance (`export/frechet.py`)
compares each sampler's volumes with DDPM's of 1000 steps, the chain that the network was trained for, and with real images.
MS-SSIM compares volume by volume, which DDPM has no say in: it draws noise at every step, so that a seed with other steps
is another volume. DDIM, PNDM and DPM-Solver++ solve one differential equation from the seed's noise; they are compared
with DDIM of 1000 steps, as its solution, over the first volumes alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm

from volcast.export.evaluation_images import ImageSet, read_images
from volcast.export.evaluation_interval import half_sample_interval
from volcast.export.frechet import FeatureMoments, feature_moments, frechet_of_moments
from volcast.export.similarity import ms_ssim
from volcast.runtime.pipeline import load
from volcast.runtime.sampler import Method

from .bench import environment, paired_ratios, summarize
from .fewer_steps_volumes import Array, Sampler, draw, read_volumes, seconds
from .report import append

SCHEDULERS: tuple[Method, ...] = ("ddim", "pndm", "dpm-solver++", "ddpm")
STEPS = (5, 10, 20, 25, 50, 100)
REFERENCE = Sampler(scheduler="ddpm", steps=1000)
SOLUTION = Sampler(scheduler="ddim", steps=1000)
PAIRED = 8
"""Volumes of `SOLUTION`, which takes as long as the reference."""


def compare(
    folder: Path, samplers: Sequence[Sampler], volumes: int, paired: int, real: ImageSet | None
) -> dict[str, Any]:
    """What the volumes in `folder` say of each sampler; all are there."""
    images = {sampler: read_volumes(folder, sampler, volumes) for sampler in (REFERENCE, *samplers)}
    solution = read_volumes(folder, SOLUTION, paired)
    shape = solution.shape[2:]
    moments = {sampler: feature_moments(each, shape) for sampler, each in images.items()}
    theirs = None if real is None else feature_moments(real.images, real.images.shape[2:])
    reference, half, rows = moments[REFERENCE], volumes // 2, np.arange(volumes)
    slow = seconds(folder, REFERENCE, volumes)
    result: dict[str, Any] = {
        "volumes": volumes,
        "paired": paired,
        "real": None if real is None else len(real.names),
        "frechet_halves": frechet_of_moments(reference.of(rows[:half]), reference.of(rows[half:])),
        "ms_ssim_reference": float(np.mean(_alike(images[REFERENCE][:paired], solution))),
        # Other seeds have other conditions, too.
        "ms_ssim_other_seeds": float(np.mean(_alike(np.roll(solution, 1, axis=0), solution))),
        "samplers": [],
    }
    for sampler, each in images.items():
        taken = seconds(folder, sampler, volumes)
        row: dict[str, Any] = {"scheduler": sampler.scheduler, "steps": sampler.steps}
        row["seconds"] = summarize(taken).as_dict()
        row["reference_over_seconds"] = paired_ratios(slow, taken).as_dict()
        if theirs is not None:
            row["frechet_real"] = frechet_of_moments(moments[sampler], theirs)
        if sampler != REFERENCE:
            row |= _frechet(moments[sampler], reference, volumes)
        if not sampler.stochastic:
            alike = _alike(each[:paired], solution)
            row |= {"ms_ssim": float(np.mean(alike)), "ms_ssim_worst": float(np.min(alike))}
        result["samplers"].append(row)
    return result


def _frechet(ours: FeatureMoments, reference: FeatureMoments, volumes: int) -> dict[str, Any]:
    value = frechet_of_moments(ours, reference)
    # The same seeds and conditions on both sides.
    interval = half_sample_interval(
        lambda rows: frechet_of_moments(ours.of(rows), reference.of(rows)),
        (volumes,), value, np.random.default_rng(0),
    )  # fmt: skip
    return {"frechet": value, "frechet_interval": interval}


def _alike(found: Array, wanted: Array) -> list[float]:
    return [ms_ssim(found[i : i + 1], wanted[i : i + 1]) for i in range(len(wanted))]


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table, one line a number of steps: Fréchet distance, MS-SSIM and seconds by scheduler."""
    rows = {(row["scheduler"], row["steps"]): row for row in result["samplers"]}
    names = [each for each in SCHEDULERS if any(each == scheduler for scheduler, _ in rows)]
    lines = ["| steps | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for steps in sorted({steps for _, steps in rows}):
        cells = [_cell(rows[name, steps]) if (name, steps) in rows else "" for name in names]
        lines.append(f"| {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    parts = [f"{row['frechet']:.4f}" if "frechet" in row else "reference"]
    parts += [f"({row['frechet_real']:.3f})"] if "frechet_real" in row else []
    parts += [f"{row['ms_ssim']:.3f}"] if "ms_ssim" in row else []
    return ", ".join([" ".join(parts[:2]), *parts[2:], f"{row['seconds']['median']:.2g} s"])


def main(
    folder: Annotated[Path, typer.Argument(help="Where the volumes are kept.")],
    artifact: Annotated[Path | None, typer.Option(help="Left out: the bundled model.")] = None,
    volumes: Annotated[int, typer.Option(min=4, max=10_000, help="Of every sampler.")] = 32,
    real: Annotated[Path | None, typer.Option(help="Folder of real images.")] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024)] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines to add to.")] = None,
) -> None:
    """Fréchet distance from 1000 steps of DDPM (from real images), MS-SSIM with DDIM's 1000, seconds a volume."""
    images = None if real is None else read_images(real)
    model = load(artifact, threads=threads)
    before = environment(threads)
    folder.mkdir(parents=True, exist_ok=True)
    samplers = [Sampler(scheduler=name, steps=steps) for name, steps in product(SCHEDULERS, STEPS)]
    paired = min(PAIRED, volumes)
    todo = {REFERENCE: volumes, SOLUTION: paired, **dict.fromkeys(samplers, volumes)}
    with tqdm(desc="fewer steps", unit="volume", file=sys.stderr, disable=None) as bar:

        def on_volume(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        draw(model, todo, folder, on_volume)
    result = compare(folder, samplers, volumes, paired, images)
    model_facts = {"name": model.spec.name, "engine": model.engine.name}
    line = {"benchmark": "fewer_steps", "environment": before, "model": model_facts, **result}
    typer.echo(as_markdown(line))
    if output is not None:
        append(output, line)


if __name__ == "__main__":
    typer.run(main)
