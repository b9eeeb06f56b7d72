"""What does feature reuse cost in likeness and save in time, beside simply taking fewer steps?

    volcast export BUNDLE --reuse -o artifact
    python -m volcast.benchmarks.reuse artifact [--samples 16] [--every 2 --every 3] [-o results/reuse.jsonl]

Every contestant draws the same seeds and conditions, in turns: the full run, the full number of steps with reuse = k, and
for each k whole steps alone, as many as take that long. A pilot finds that number: of its rounds' times of the loop, the
median over the full run's. Likeness is to the full run's volume of the same seed and condition; the Fréchet distance is
that of all volumes from all of the full run's, and `frechet_seeds` that of one half of those from the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
import typer
from numpy.typing import NDArray

from volcast.export.calibration import draw_condition
from volcast.export.frechet import frechet
from volcast.export.similarity import ms_ssim, psnr
from volcast.runtime.pipeline import Model, load
from volcast.runtime.programs import ProgramName

from .bench import environment, measure, paired_ratios, summarize
from .quantization import program_call
from .report import append

Array = NDArray[np.float32]
PROGRAMS: tuple[ProgramName, ...] = ("step", "step_deep", "step_shallow")
PILOT = 3
"""Rounds of the pilot."""


@final
@dataclass(frozen=True, kw_only=True)
class Run:
    """One contestant: so many steps, the whole network at every `reuse`-th."""

    steps: int
    reuse: int = 1


@final
@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a contestant made: volumes `[samples, 1, D, H, W]`, and seconds of each one's loop and of all of it."""

    volumes: Array
    loop: tuple[float, ...]
    total: tuple[float, ...]


def draw(model: Model, runs: Sequence[Run], seeds: range, guidance: float | None) -> list[Drawn]:
    """Every seed's volume by every run, the runs in turns. Each is opened before the first is timed."""
    found: list[list[tuple[Array, float, float]]] = [[] for _ in runs]
    for reuse in {run.reuse for run in runs}:
        model.sample(0, steps=2, reuse=reuse, guidance=guidance)
    for seed in seeds:
        condition = draw_condition(model.spec, {}, np.random.default_rng(seed))
        for each, run in zip(found, runs, strict=True):
            volume = model.sample(
                seed, steps=run.steps, reuse=run.reuse, guidance=guidance, condition=condition
            )
            assert volume.report is not None
            array = np.asarray(volume.array, np.float32)
            each.append((array[None], volume.report.loop_seconds, volume.report.total_seconds))
    return [
        Drawn(volumes=np.stack([a for a, _, _ in each]), loop=tuple(s for _, s, _ in each), total=tuple(t for _, _, t in each))
        for each in found
    ]  # fmt: skip


def as_long(model: Model, runs: Sequence[Run], full: Run, guidance: float | None) -> list[Run]:
    """For each of `runs` the run of whole steps that takes as long, by a pilot."""
    first, *others = draw(model, [full, *runs], range(PILOT), guidance)
    shares = [paired_ratios(other.loop, first.loop).median for other in others]
    return [Run(steps=max(1, min(full.steps, round(full.steps * share)))) for share in shares]


def calls(artifact: Path, engine: str, threads: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a call of the step and of the two programs for reuse, in turns, and the latter's over the step's."""
    functions = [program_call(artifact, name, engine, threads, None, 1)[0] for name in PROGRAMS]
    step, *others = (
        [1e3 * each for each in taken] for taken in measure(functions, warmup=3, repeats=repeats)
    )
    line: dict[str, Any] = {"benchmark": "reuse calls", "engine": engine, "threads": threads}
    line["step_ms"] = summarize(step).as_dict()
    for name, taken in zip(PROGRAMS[1:], others, strict=True):
        line[f"{name}_ms"] = summarize(taken).as_dict()
        line[f"{name}_over_step"] = paired_ratios(taken, step).as_dict()
    return line


def compare(found: Drawn, full: Drawn) -> dict[str, Any]:
    """Time and likeness of one contestant beside the full run."""
    pairs = [(a[None], b[None]) for a, b in zip(found.volumes, full.volumes, strict=True)]
    same = found is full
    return {
        "loop_s": summarize(found.loop).as_dict(),
        "volume_s": summarize(found.total).as_dict(),
        "loop_over_full": paired_ratios(found.loop, full.loop).as_dict(),
        "volume_over_full": paired_ratios(found.total, full.total).as_dict(),
        "ms_ssim": None if same else summarize([ms_ssim(*pair) for pair in pairs]).as_dict(),
        "psnr_db": None if same else summarize([psnr(*pair) for pair in pairs]).as_dict(),
        "frechet": None if same else frechet(found.volumes, full.volumes),
    }


def main(
    artifact: Annotated[Path, typer.Argument(help="Folder that `volcast export --reuse` wrote.")],
    samples: Annotated[int, typer.Option(min=2, max=10_000, help="Seeds.")] = 16,
    steps: Annotated[int, typer.Option(min=2, help="Of the full run.")] = 50,
    every: Annotated[list[int], typer.Option(min=2, help="reuse=k; repeatable.")] = [2, 3, 5],  # noqa: B006
    guidance: Annotated[float | None, typer.Option(help="Weight of classifier-free guidance.")] = None,
    engine: Annotated[str, typer.Option(help="openvino or onnxruntime.")] = "openvino",
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="Calls of each program.")] = 200,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Append a JSON line a contestant, one for the calls."),
    ] = None,
) -> None:
    """Feature reuse against fewer steps, on one artifact."""
    model = load(artifact, engine, threads)
    where = environment(model.engine.threads)
    called = calls(artifact, engine, model.engine.threads, repeats)
    shares = [f"{name} {called[f'{name}_over_step']['median']:.2f}" for name in PROGRAMS[1:]]
    typer.echo(f"a call over the step's, medians: {', '.join(shares)}")
    if output is not None:
        append(output, {"environment": where, "model": model.spec.name, **called})
    full = Run(steps=steps)
    reusing = [Run(steps=steps, reuse=k) for k in every]
    fewer = as_long(model, reusing, full, guidance)
    runs = [full, *dict.fromkeys(run for pair in zip(reusing, fewer, strict=True) for run in pair)]
    drawn = draw(model, runs, range(samples), guidance)
    half = samples // 2
    seeds = frechet(drawn[0].volumes[:half], drawn[0].volumes[half:])
    for run, found in zip(runs, drawn, strict=True):
        line = {
            "benchmark": "reuse", "model": model.spec.name, "engine": model.engine.name,
            "threads": model.engine.threads, "guidance": guidance, "samples": samples, "steps": run.steps,
            "reuse": run.reuse, "full_steps": steps, "frechet_seeds": seeds, **compare(found, drawn[0]),
        }  # fmt: skip
        typer.echo(as_text(line))
        if output is not None:
            append(output, {"environment": where, **line})
    typer.echo(f"Fréchet distance between halves of the full run's seeds {seeds:.4f}; load {where['load']}")


def as_text(line: dict[str, Any]) -> str:
    """The line for a reader."""
    time = f"loop {line['loop_s']['median']:.2f} s, {line['loop_over_full']['median']:.2f} of the full run's"
    name = f"{line['steps']:>3} steps, reuse {line['reuse']}: {time}"
    if line["frechet"] is None:
        return name
    likeness, signal = line["ms_ssim"], line["psnr_db"]
    return (
        f"{name}; MS-SSIM {likeness['median']:.4f} (worst {likeness['minimum']:.4f}), "
        f"PSNR {signal['median']:.1f} dB, Fréchet {line['frechet']:.5f}"
    )


if __name__ == "__main__":
    typer.run(main)
