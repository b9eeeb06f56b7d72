"""What does the gateway add to a request? The same one over gRPC to Triton and over HTTP through the gateway, in turns.

    python -m volcast.benchmarks.gateway [ARTIFACT] [--steps 1,10] [--repeats 200] [-o results/gateway.jsonl]

Starts a `volcast serve` and a gateway of its own before it. "grpc" asks Triton for a `.nii.gz`, "file" the gateway for one
file, "events" the gateway for events and then fetches the volume that they name. It prints a JSON line for each number of steps.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
import typer

from volcast.export.triton_config import model_name
from volcast.runtime.artifact import read_artifact
from volcast.runtime.client import Client
from volcast.runtime.default_artifact import default_artifact
from volcast.runtime.engine_name import EngineName
from volcast.runtime.interface import as_bytes, text_of
from volcast.runtime.sizes import parse_sizes

from .bench import environment, measure
from .report import append
from .server import start_server


@final
class Caller:
    """Asks one gateway, over connections that stay open."""

    def __init__(self, port: int, model: str) -> None:
        self._path = f"/v1/models/{model}/generate"
        self._asks, self._fetches = (http.client.HTTPConnection("127.0.0.1", port) for _ in range(2))

    def file(self, body: bytes) -> bytes:
        """One volume as the answer."""
        return self._ask(body, "application/gzip").read()

    def events(self, body: bytes) -> bytes:
        """One volume by its event."""
        answer, url = self._ask(body, "text/event-stream"), ""
        content = b""
        name = b""
        while line := answer.readline().rstrip():
            key, _, value = line.partition(b": ")
            name = value if key == b"event" else name
            if key == b"data":
                answer.readline()  # the blank one behind it
                if name == b"volume":
                    url = json.loads(value)["url"]
                    self._fetches.request("GET", url)
                    content = self._fetches.getresponse().read()
                if name in (b"end", b"error"):
                    break
        answer.read()
        return content

    def close(self) -> None:
        self._asks.close()
        self._fetches.close()

    def _ask(self, body: bytes, accept: str) -> http.client.HTTPResponse:
        self._asks.request("POST", self._path, body, {"Content-Type": "application/json", "Accept": accept})
        answer = self._asks.getresponse()
        if answer.status != 200:
            raise ValueError(f"[bench] the gateway answers {answer.status}: {answer.read().decode()}")
        return answer


@contextmanager
def start_gateway(folder: Path, grpc: str) -> Iterator[int]:
    """The port of a gateway of its own before the Triton at `grpc`. ValueError: it does not start."""
    command = [
        sys.executable,
        "-m",
        "volcast",
        "serve",
        str(folder),
        "--server",
        grpc,
        "--port",
        "0",
        "--rate",
        "1e6",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            told = process.stderr.readline()
            port = told.rstrip().rpartition(":")[2]
            if not port.isdecimal():
                raise ValueError(f"[bench] the gateway did not start: {told} {process.stderr.read()}")
            # Its log, a line a request, goes on: nobody may let the pipe fill.
            with subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL):
                yield int(port)
                process.terminate()
        finally:
            process.terminate()


def compare(client: Client, caller: Caller, asked: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Milliseconds of each way and what the gateway's add to gRPC's, round by round: p50, p95, and the least."""
    body = json.dumps(asked).encode()
    tensors = {**asked, "output_format": as_bytes("nifti")}

    def grpc() -> bytes:
        return next(
            one["nifti"].tobytes()
            for one in list(client.answers(tensors))
            if text_of(one["kind"]) == "volume"
        )

    ways: dict[str, Callable[[], bytes]] = {
        "grpc": grpc, "file": lambda: caller.file(body), "events": lambda: caller.events(body),
    }  # fmt: skip
    volumes = {call() for call in ways.values()}
    if len(volumes) > 1 or b"" in volumes:
        raise ValueError("[bench] the volumes differ; nothing to compare")
    ms = {
        name: 1e3 * np.array(taken)
        for name, taken in zip(ways, measure(list(ways.values()), 3, repeats), strict=True)
    }
    return {
        "bytes": len(volumes.pop()),
        "ms": {name: _told(taken) for name, taken in ms.items()},
        "added_ms": {name: _told(ms[name] - ms["grpc"]) for name in ("file", "events")},
    }


def _told(ms: np.ndarray) -> dict[str, float | int]:
    p50, p95 = np.percentile(ms, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "minimum": float(ms.min()), "count": len(ms)}


def main(
    artifact: Annotated[Path | None, typer.Argument(help="Left out: the bundled model.")] = None,
    engine: Annotated[EngineName, typer.Option(help="Of the server.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Likewise.")] = 1,
    steps: Annotated[str, typer.Option(help="One or several numbers, with commas between.")] = "1,10",
    size: Annotated[str | None, typer.Option(help="Latent sizes, as 8,12,8.")] = None,
    repeats: Annotated[int, typer.Option(min=1, max=10000)] = 200,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append the results to this file, as JSON lines.")
    ] = None,
) -> None:
    """Milliseconds of a request straight to Triton and through the gateway, and what the gateway adds."""
    folder = (artifact or default_artifact()).resolve()
    spec = read_artifact(folder)
    name = model_name(spec)
    sizes: Sequence[int] | None = parse_sizes("bench", size)
    with (
        start_server(folder, engine, threads) as server,
        start_gateway(folder, server.grpc) as port,
        Client(server.grpc) as client,
    ):
        for count in parse_sizes("bench", steps) or ():
            caller = Caller(port, name)
            asked = {"seed": 1, "steps": count, **({} if sizes is None else {"size": list(sizes)})}
            where = environment(threads)
            line = {
                "benchmark": "gateway", "artifact": spec.name, "engine": engine, **asked, "environment": where,
                **compare(client, caller, asked, repeats), "load_after": round(os.getloadavg()[0], 2),
            }  # fmt: skip
            caller.close()
            typer.echo(json.dumps(line))
            if output is not None:
                append(output, line)


if __name__ == "__main__":
    typer.run(main)
