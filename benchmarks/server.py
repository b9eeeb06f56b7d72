"""A `volcast serve` of a benchmark's own, and what it counts."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, final

from volcast.runtime.engine_name import EngineName


@final
@dataclass(frozen=True, kw_only=True)
class Server:
    """Host and port of Triton's gRPC, and the address of its metrics."""

    grpc: str
    metrics: str


def serve_command(artifact: Path | None, engine: EngineName, threads: int | None) -> tuple[list[str], Server]:
    """The command of a `volcast serve` on free ports, and where it will be. `artifact`: None for the bundled model."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    command = [sys.executable, "-m", "volcast", "serve", *([] if artifact is None else [str(artifact)])]
    command += ["--engine", engine, *([] if threads is None else ["--threads", str(threads)])]
    for name, port in zip(("--port", "--http-port", "--grpc-port", "--metrics-port"), ports, strict=True):
        command += [name, str(port)]
    return command, Server(grpc=f"127.0.0.1:{ports[2]}", metrics=f"http://127.0.0.1:{ports[3]}/metrics")


@contextmanager
def start_server(
    artifact: Path | None, engine: EngineName, threads: int | None, *, active: int = 64, queue: int = 256
) -> Iterator[Server]:
    """One that runs until the end of the block. `artifact`: None for the bundled model. ValueError: it does not start."""
    command, server = serve_command(artifact, engine, threads)
    command += ["--active", str(active), "--queue", str(queue)]
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
            threading.Thread(target=_pass_on, args=[process.stderr], daemon=True).start()
            yield server
        finally:
            process.terminate()


def _pass_on(lines: IO[str]) -> None:
    # A restart explains figures that nobody would understand.
    with suppress(ValueError):  # closed, at the end
        for line in lines:
            sys.stderr.write(line)


def read_counts(address: str) -> dict[str, float]:
    """volcast's own metrics at `address`, by name and, behind a space, the value of its label; histograms left out."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^(volcast_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        own = re.findall(r'(?:batch|outcome)="(\w+)"', labels)
        if "phase=" not in labels:
            found[" ".join([name, *own])] = float(value)
    return found
