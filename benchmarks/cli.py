"""`volcast bench`. torch and MONAI are imported by the peers' processes, not by this one."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer


def bench(
    artifact: Annotated[
        Path | None,
        typer.Argument(help="Folder written by `volcast export`; left out: the bundled hippocampus model."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="The bundle that ARTIFACT was exported from; left out: the bundled model's."),
    ] = None,
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 50,
    repeats: Annotated[int, typer.Option(help="Rounds; in each, every contestant samples one volume.")] = 3,
    peers: Annotated[
        str, typer.Option(help="Of monai, compile, onnxruntime, with commas between; or none.")
    ] = "monai,compile,onnxruntime",
    engine: Annotated[str, typer.Option(help="volcast's engine; several with commas between.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    limit: Annotated[
        float, typer.Option(help="Seconds that a peer may take to export, load or compile.")
    ] = 900,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append the result to this file, as a JSON line.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar plot, as PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")] = False,
) -> None:
    """Measure volcast beside MONAI, torch.compile and a plain ONNX export, in turns, in one run."""
    from . import report
    from .bench import environment
    from .entries import INSTALL, Selection, parse_peers, prepare

    chosen = parse_peers(peers)
    if not 1 <= repeats <= 1000:
        raise ValueError(f"[bench] repeats={repeats}: need 1..1000")
    if not 0 < limit <= 86400:
        raise ValueError(f"[bench] limit={limit}: need a number of seconds up to 86400")
    for path in (output, plot):
        if path is not None and path.is_dir():
            raise ValueError(f"[bench] {path} is a folder; name a file in it")
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise ValueError(
                f"[bench] {path.parent} is not a folder that can be written to; choose another output"
            )
    if plot is not None:
        _check_plot(plot, INSTALL)
    selection = Selection(
        artifact=artifact, bundle=against, peers=chosen, engines=tuple(engine.split(",")), threads=threads
    )
    ready = prepare(selection, steps)
    where = environment(ready.task.threads)
    if where["load"] > where["cores"] / 4:
        # A second busy process made MONAI with two threads ten times slower, and OpenVINO twice.
        typer.echo(f"volcast: the machine is busy (load {where['load']}): do not trust the figures", err=True)
    results = _race(ready, repeats, limit)
    line = report.record(
        results,
        environment=where,
        model=ready.model,
        settings={"steps": steps, "repeats": repeats, "batch": 1, "scheduler": "ddim", "compat": "monai-1.6"},
    )
    # The result is printed first: what follows may fail, and the run was long.
    title = report.heading(line)
    typer.echo(json.dumps(line) if as_json else f"{title}\n{report.table(results, steps)}")
    if output is not None:
        report.append(output, line)
    if plot is not None and any(result.rounds for result in results):
        report.plot(results, steps, title, plot)


def _race(ready: Any, repeats: int, limit_s: float) -> list[Any]:
    from tqdm import tqdm

    from .race import race, stages

    total = stages(ready.entries, ready.exports, repeats)
    with tqdm(total=total, desc="bench", unit="turn", file=sys.stderr, disable=None) as bar:

        def progress(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update()

        return race(
            ready.entries,
            ready.task,
            exports=ready.exports,
            repeats=repeats,
            limit_s=limit_s,
            progress=progress,
        )


def _check_plot(path: Path, install: str) -> None:
    if path.suffix != ".png":
        raise ValueError(f"[bench] plot={path}: need a name that ends in .png")
    if find_spec("matplotlib") is None:
        raise ValueError(f"[bench] plot: matplotlib is not installed; {install}")
