"""Every engine on the same artifact in one run: which is fastest here, what does it cost, how far off is it?

    python -m volcast.benchmarks.engines [ARTIFACT ...] [--steps 50] [--repeats 5] [-o results/engines.jsonl]

Each engine samples in a process of its own, in turns; further artifacts are the same model in other precisions. An
engine that cannot run here is listed with its reason. The first engine and artifact is what the others are held against.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, get_args

import typer

from volcast.runtime.artifact import read_artifact
from volcast.runtime.default_artifact import default_artifact
from volcast.runtime.engine_auto import physical_cores
from volcast.runtime.engine_name import EngineName
from volcast.runtime.noise import request_noise
from volcast.runtime.spec import ArtifactSpec

from .bench import environment
from .contestant import Task
from .engine_report import as_markdown, as_record
from .entries import SEED, default_conditions
from .race import race, stages
from .report import append
from .worker import Entry

ENGINES = tuple(sorted((name for name in get_args(EngineName) if name != "auto"), key="onnxruntime".__ne__))
"""The CPU's plain ONNX Runtime, which runs everywhere, first."""


def entries(artifacts: dict[str, Path], engines: tuple[str, ...]) -> list[Entry]:
    """One for each engine and artifact, by the label of the artifact."""
    return [
        Entry(
            name=f"volcast {engine} {label}",
            module="volcast.benchmarks.contestants_volcast",
            function="EngineContestant",
            options=(("engine", engine), ("artifact", str(folder))),
        )
        for label, folder in artifacts.items()
        for engine in engines
    ]


def labelled(folders: list[Path]) -> tuple[dict[str, Path], ArtifactSpec]:
    """The artifacts by their precision, and the first one's manifest.

    Raises ValueError: two of one precision, or not the same model.
    """
    specs = [read_artifact(folder) for folder in folders]
    labels = {str(spec.precision): folder for spec, folder in zip(specs, folders, strict=True)}
    if len(labels) != len(folders):
        raise ValueError("[engines] two artifacts of one precision: give each precision once")
    for spec in specs[1:]:
        if (spec.name, spec.latent_shape) != (specs[0].name, specs[0].latent_shape):
            raise ValueError(
                f"[engines] {spec.name} and {specs[0].name} are two models: give one in several precisions"
            )
    return labels, specs[0]


def main(
    artifacts: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of one model; left out: the bundled hippocampus model."),
    ] = None,
    engine: Annotated[list[str], typer.Option(help="Only these; repeatable.")] = list(ENGINES),  # noqa: B006
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    repeats: Annotated[int, typer.Option(help="Rounds; in each, every engine samples one volume.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    limit: Annotated[
        float, typer.Option(help="Seconds that an engine may take to open and for its first volume.")
    ] = 900,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append the result to this file, as a JSON line.")
    ] = None,
) -> None:
    """Run every engine on the same artifact."""
    from tqdm import tqdm

    unknown = sorted(set(engine) - set(ENGINES))
    if unknown or not 1 <= repeats <= 1000:
        raise ValueError(
            f"[engines] engine={unknown}, repeats={repeats}: need some of {', '.join(ENGINES)} and 1..1000"
        )
    folders, spec = labelled(artifacts or [default_artifact()])
    count = physical_cores() if threads is None else threads
    task = Task(
        artifact=next(iter(folders.values())), bundle=None, plain=None, steps=steps, threads=count, seed=SEED,
        noise=request_noise(SEED, range(1), 0, spec.latent_shape), conditions=default_conditions(spec), weights={},
    )  # fmt: skip
    chosen = entries(folders, tuple(engine))
    where = environment(count)
    with tqdm(
        total=stages(chosen, {}, repeats), desc="engines", unit="turn", file=sys.stderr, disable=None
    ) as bar:

        def progress(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update()

        results = race(chosen, task, exports={}, repeats=repeats, limit_s=limit, reference=chosen[0].name,
                       progress=progress)  # fmt: skip
    line = as_record(results, spec=spec, environment=where, steps=steps, repeats=repeats)
    print(as_markdown(json.loads(json.dumps(line))))
    if output is not None:
        append(output, line)


if __name__ == "__main__":
    typer.run(main)
