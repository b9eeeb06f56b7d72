"""What does the server add to a volume? `volcast serve` on this machine, beside `Model.sample` in this process, in turns.

Run it as `python -m volcast.benchmarks.serving ARTIFACT`; it prints one JSON line.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from volcast.runtime.client import Client
from volcast.runtime.engine_name import EngineName
from volcast.runtime.pipeline import load
from volcast.runtime.volume import Volume

from .bench import environment, measure, summarize


@contextmanager
def server(artifact: Path, engine: EngineName, threads: int) -> Iterator[str]:
    """The gRPC address of a `volcast serve` of its own."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    command = [
        sys.executable,
        "-m",
        "volcast",
        "serve",
        str(artifact),
        "--engine",
        engine,
        "--threads",
        str(threads),
    ]
    command += [
        word
        for pair in zip(("--http-port", "--grpc-port", "--metrics-port", "--port"), ports, strict=True)
        for word in pair
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "ready:" in line:
                    break
            else:
                raise ValueError(f"[bench] the server did not start: {' '.join(lines)}")
            yield f"127.0.0.1:{ports[1]}"
        finally:
            process.terminate()


def main(
    artifact: Path,
    engine: Annotated[EngineName, typer.Option(help="Of both.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Of both.")] = 1,
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    repeats: Annotated[int, typer.Option(min=1, max=10000)] = 100,
) -> None:
    """Milliseconds a volume: in this process, as a future of this process, from the server, and what the server adds."""
    with (
        server(artifact, engine, threads) as address,
        Client(address) as client,
        load(artifact, engine, threads) as model,
    ):
        contestants: dict[str, Callable[[], Volume]] = {
            "sample": lambda: model.sample(1, steps=steps),
            "submit": lambda: model.submit(1, steps=steps).result(),
            "server": lambda: client.sample(1, steps=steps),
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
    }  # fmt: skip
    typer.echo(json.dumps(line))


if __name__ == "__main__":
    typer.run(main)
