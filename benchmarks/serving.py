"""What does the server add to a volume? `volcast serve` on this machine, beside `Model.sample` in this process, in turns.

    python -m volcast.benchmarks.serving [ARTIFACT] [--steps 20] [--size 128,128,64] [-o results/serving.jsonl]

It prints one JSON line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from volcast.runtime.client import Client
from volcast.runtime.engine_name import EngineName
from volcast.runtime.pipeline import load
from volcast.runtime.sizes import parse_sizes
from volcast.runtime.volume import Volume

from .bench import environment, measure, summarize
from .report import append
from .server import start_server


def main(
    artifact: Annotated[Path | None, typer.Argument(help="Left out: the bundled model.")] = None,
    engine: Annotated[EngineName, typer.Option(help="Of both.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Of both.")] = 1,
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    size: Annotated[str | None, typer.Option(help="Latent sizes, as 8,12,8.")] = None,
    repeats: Annotated[int, typer.Option(min=1, max=10000)] = 100,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append the result to this file, as a JSON line.")
    ] = None,
) -> None:
    """Milliseconds a volume: in this process, as a future of this process, from the server, from the server through
    shared memory, and what the server adds."""
    sizes = parse_sizes("bench", size)
    with (
        start_server(artifact, engine, threads) as server,
        Client(server.grpc) as client,
        Client(server.grpc, shared_memory=True) as near,
        load(artifact, engine, threads) as model,
    ):
        contestants: dict[str, Callable[[], Volume]] = {
            "sample": lambda: model.sample(1, steps=steps, size=sizes),
            "submit": lambda: model.submit(1, steps=steps, size=sizes).result(),
            "server": lambda: client.sample(1, steps=steps, size=sizes),
            "shared": lambda: near.sample(1, steps=steps, size=sizes),
        }
        volumes = [call() for call in contestants.values()]
        if any((one.array != volumes[0].array).any() for one in volumes):
            raise ValueError("[bench] the volumes differ; nothing to compare")
        taken = [np.array(seconds) * 1e3 for seconds in measure(list(contestants.values()), 3, repeats)]
    times = dict(zip(contestants, taken, strict=True))
    line = {
        "benchmark": "serving", "artifact": model.spec.name, "engine": model.engine.name, "steps": steps,
        "shape": list(volumes[0].array.shape), "environment": environment(threads),
        "ms": {name: summarize(one.tolist()).as_dict() for name, one in times.items()},
        "added_ms": summarize((times["server"] - times["sample"]).tolist()).as_dict(),
        "added_shared_ms": summarize((times["shared"] - times["sample"]).tolist()).as_dict(),
    }  # fmt: skip
    typer.echo(json.dumps(line))
    if output is not None:
        append(output, line)


if __name__ == "__main__":
    typer.run(main)
