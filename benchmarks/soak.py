"""Does a server survive? Mixed requests with cancels and cut connections while its model processes are killed.

Run it as `python -m volcast.benchmarks.soak ARTIFACT`; it prints one JSON line: what became of the requests, how fast the
server was back, and what each of its processes held before and after. Exit code 1: a request got no answer, two, or
other bits than it has alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, final

import typer

from volcast.runtime.client import Client
from volcast.runtime.engine_name import EngineName
from volcast.runtime.pipeline import load

from .bench import environment
from .server import serve_command
from .soak_callers import make_kinds, soak
from .soak_usage import OWN, STUB, TRITON, processes, shared_memory, usage


@final
class Soaked:
    """A `volcast serve` of the soak's own, its processes, and the times at which it said that it was ready."""

    def __init__(self, artifact: Path, engine: EngineName, threads: int) -> None:
        command, server = serve_command(artifact, engine, threads)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.address, self.lines = server.grpc, list[str]()
        self.ready: list[float] = []
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        self.wait(1)

    def wait(self, count: int) -> float:
        """The time of the `count`th "ready"."""
        with self._news:
            if not self._news.wait_for(lambda: len(self.ready) >= count, 120):
                raise ValueError(f"[soak] the server is not ready: {''.join(self.lines[-20:])}")
            return self.ready[count - 1]

    def kill(self, name: str, number: int = signal.SIGKILL) -> float:
        """Seconds from the signal until the server is ready again."""
        before = len(self.ready)
        began = time.monotonic()
        for found, pid in processes(self.process.pid):
            if found == name:
                os.kill(pid, number)
        return self.wait(before + 1) - began

    def stop(self) -> tuple[float, int]:
        """Seconds that it took, and the exit code."""
        began = time.monotonic()
        self.process.terminate()
        code = self.process.wait(120)
        return time.monotonic() - began, code

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line)
                if "ready:" in line:
                    self.ready.append(time.monotonic())
                self._news.notify_all()


def main(
    artifact: Path,
    engine: Annotated[
        EngineName, typer.Option(help="Of the server and of the volumes that it must give.")
    ] = "onnxruntime",
    requests: Annotated[int, typer.Option(min=1)] = 1000,
    kills: Annotated[
        int, typer.Option(min=0, help="Of the model's process, spread over the first half.")
    ] = 3,
    concurrency: Annotated[int, typer.Option(min=1)] = 16,
    seed: int = 0,
) -> None:
    """Soak a server of this artifact."""
    with load(artifact, engine, 1) as model:
        kinds = make_kinds(model, 40, seed)
    soaked = Soaked(artifact, engine, 1)
    at = {round((number + 1) * requests / (2 * kills + 2)): number for number in range(kills)}
    back: list[float] = []
    killers: list[threading.Thread] = []

    def on_done(done: int) -> None:
        if done in at:
            killers.append(threading.Thread(target=lambda: back.append(soaked.kill(STUB))))
            killers[-1].start()

    try:
        # What is allocated once is there after every kind of request; nothing is killed in the second half.
        own = usage(soaked.process.pid)[OWN]
        began = time.monotonic()
        first = soak(
            soaked.address, kinds, requests // 2, concurrency=concurrency, seed=seed, on_done=on_done
        )
        for killer in killers:
            killer.join()
        _settle(soaked.address)
        before, shared_before = usage(soaked.process.pid), shared_memory(soaked.process.pid)
        second = soak(
            soaked.address, kinds, requests - requests // 2, concurrency=concurrency, seed=seed + 1, on_done=lambda _: None
        )  # fmt: skip
        seconds = time.monotonic() - began
        _settle(soaked.address)
        after, shared_after = usage(soaked.process.pid), shared_memory(soaked.process.pid)
        # The supervisor mends five faults a minute at once.
        time.sleep(60)
        others = {
            f"{number.name} {name}": round(soaked.kill(name, number), 2)
            for number in (signal.SIGKILL, signal.SIGSTOP) for name in (STUB, TRITON)
        }  # fmt: skip
        stopped, code = soaked.stop()
    finally:
        soaked.process.kill()
    wrong = first.wrong + second.wrong
    line = {
        "benchmark": "soak", "artifact": model.spec.name, "engine": model.engine.name, "requests": requests,
        "seconds": round(seconds, 1), "ended": dict(first.ended + second.ended), "tries": dict(first.tries + second.tries),
        "wrong": wrong, "back_s": {"under load, SIGKILL " + STUB: [round(one, 2) for one in back], **others},
        "restarts": [re.sub(r"[\d.]+:\d+", "server", one.strip()) for one in soaked.lines if "restarting" in one],
        "half": {name: asdict(one) for name, one in before.items()},
        "end": {name: asdict(one) for name, one in after.items()}, "serve_at_start": asdict(own),
        "shared_memory": [shared_before, shared_after, shared_memory(soaked.process.pid)],
        "stop": {"seconds": round(stopped, 2), "code": code}, "environment": environment(1),
    }  # fmt: skip
    typer.echo(json.dumps(line))
    raise typer.Exit(1 if wrong or code else 0)


def _settle(address: str) -> None:
    """Wait until a volume comes, and what was given up has been let go."""
    with Client(address, tries=10) as client:
        client.sample(0, steps=1)
    time.sleep(2)


if __name__ == "__main__":
    typer.run(main)
