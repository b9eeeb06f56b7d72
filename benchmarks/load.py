"""What does a server do under load? Callers in turns, callers at once, and more of them than it can serve.

    python -m volcast.benchmarks.load [ARTIFACT] [--steps 5,10,25] [--overload 2] [-o results/load.jsonl] [--plot load.png]

Starts a `volcast serve` and sends it requests as `--rounds` times these three, `--seconds` each: one caller after another
("alone"), `--callers` at once ("together": its capacity), and Poisson arrivals at `--overload` times that capacity
("open"), where every request counts from when it was due and a refusal is not tried again.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from volcast.runtime.artifact import read_artifact
from volcast.runtime.client_async import AsyncClient
from volcast.runtime.default_artifact import default_artifact
from volcast.runtime.engine_auto import physical_cores, resolve_engine
from volcast.runtime.engine_name import EngineName

from . import load_report
from .bench import environment, paired_ratios
from .load_run import Load, Mix, Sent
from .report import append
from .server import Server, read_counts, start_server

PHASES = ("alone", "together", "open")


async def run_phase(
    server: Server, mix: Mix, phase: str, *, callers: int, rate: float, seconds: float, limit_s: float,
    rng: np.random.Generator,
) -> tuple[dict[str, Any], list[Sent]]:  # fmt: skip
    """One of `PHASES`: its `load_report.summary` and the requests sent. `rate`: arrivals a second, of "open"."""
    before, load_before = read_counts(server.metrics), os.getloadavg()[0]
    async with AsyncClient(server.grpc, tries=1) as client:
        load = Load(client, mix, rng)
        if phase == "open":
            await load.open_loop(rate, seconds)
        else:
            await load.closed_loop(1 if phase == "alone" else callers, seconds)
        await _idle(server)
    found = load_report.summary(load.sent, seconds, before, read_counts(server.metrics), limit_s)
    return {"load": round(load_before, 2), **found}, load.sent


async def _idle(server: Server) -> None:
    """Until what was cancelled has left, so that phases do not share the server."""
    while True:
        await asyncio.sleep(0.6)  # metrics come four times a second
        if not read_counts(server.metrics)["volcast_open_requests"]:
            return


def ratios(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Steps a second, each round's paired: callers at once over one after another, goodput in overload over capacity."""
    alone, together, goodput = (
        [one[phase][name] for one in rounds]
        for phase, name in (("alone", "steps_s"), ("together", "steps_s"), ("open", "goodput_steps_s"))
    )
    return {
        "together_over_alone": paired_ratios(together, alone).as_dict(),
        "goodput_over_capacity": paired_ratios(goodput, together).as_dict(),
    }


def main(
    artifact: Annotated[Path | None, typer.Argument(help="Left out: the bundled model.")] = None,
    engine: Annotated[EngineName, typer.Option(help="What runs the networks.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    active: Annotated[int, typer.Option(help="As `volcast serve` takes it.")] = 8,
    queue: Annotated[int, typer.Option(help="As `volcast serve` takes it.")] = 8,
    steps: Annotated[
        str, typer.Option(help="A request draws one of these, with commas between.")
    ] = "5,10,25",
    priorities: Annotated[str, typer.Option(help="And one of these.")] = "0",
    guidance: Annotated[float | None, typer.Option(help="Of every request.")] = None,
    preview_every: Annotated[int, typer.Option(help="Steps between previews; 0: none.")] = 0,
    callers: Annotated[int, typer.Option(help="At once, in the phase that measures the capacity.")] = 8,
    overload: Annotated[float, typer.Option(help="Arrivals over the capacity.")] = 2.0,
    limit: Annotated[float, typer.Option(help="Seconds after which a volume counts no more.")] = 60.0,
    seconds: Annotated[float, typer.Option(help="Of each phase.")] = 30.0,
    rounds: Annotated[int, typer.Option(help="Of the three phases.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the arrivals and of what is asked for.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append the result to this file, as a JSON line.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the last overload as PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")] = False,
) -> None:
    """Load on a server of its own, measured from outside."""
    mix = Mix(steps=_whole("steps", steps, 1), priorities=_whole("priorities", priorities, -8), guidance=guidance,
              preview_every=preview_every)  # fmt: skip
    if not (seconds > 0 and rounds > 0 and callers > 0 and overload > 0):
        raise ValueError("[bench] seconds, rounds, callers and overload: need numbers above 0")
    engine, threads = resolve_engine(engine, threads)
    spec = read_artifact(artifact or default_artifact())
    where, rng = environment(threads or physical_cores()), np.random.default_rng(seed)
    found: list[dict[str, dict[str, Any]]] = []
    sent: list[Sent] = []
    with start_server(artifact, engine, threads, active=active, queue=queue) as server:
        for turn in range(rounds):
            results: dict[str, dict[str, Any]] = {}
            for phase in PHASES:
                print(f"round {turn + 1} of {rounds}: {phase}", file=sys.stderr)
                capacity = results["together"]["steps_s"] / np.mean(mix.steps) if phase == "open" else 0.0
                results[phase], sent = asyncio.run(
                    run_phase(
                        server, mix, phase, callers=callers, rate=overload * capacity, seconds=seconds, limit_s=limit,
                        rng=rng,
                    )
                )  # fmt: skip
            found.append(results)
    settings = {"active": active, "queue": queue, "callers": callers, "overload": overload, "limit_s": limit}
    line = {"benchmark": "load", "artifact": spec.name, "engine": engine, "settings": {**settings, **asdict(mix)},
            "environment": where, "ratios": ratios(found), "rounds": found}  # fmt: skip
    print(json.dumps(line) if as_json else as_text(line))
    if output is not None:
        append(output, line)
    if plot is not None:
        load_report.plot(sent, as_text(line).splitlines()[0], plot)


def as_text(line: dict[str, Any]) -> str:
    """The ratios in a line, and the last overload's latencies."""
    both, last = line["ratios"], line["rounds"][-1]
    together, goodput = both["together_over_alone"], both["goodput_over_capacity"]
    head = (
        f"{line['artifact']}, {line['engine']}, {line['environment']['threads']} threads: together "
        f"{together['median']:.2f} ({together['minimum']:.2f}..{together['maximum']:.2f}) times alone, "
        f"{last['together']['steps_s']:.1f} steps/s in batches of {last['together']['mean_batch']:.1f}; at "
        f"{line['settings']['overload']:g} times that, goodput {goodput['median']:.2f} "
        f"({goodput['minimum']:.2f}..{goodput['maximum']:.2f}); load {[one[p]['load'] for one in line['rounds'] for p in PHASES]}"
    )
    return f"{head}\n{load_report.table(last['open'])}\n{last['open']['outcomes']}"


def _whole(name: str, text: str, low: int) -> tuple[int, ...]:
    try:
        values = tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ValueError(f"[bench] {name}={text!r}: need whole numbers with commas between") from error
    if min(values) < low:
        raise ValueError(f"[bench] {name}={text!r}: need {low} or more")
    return values


if __name__ == "__main__":
    typer.run(main)
