"""A `volcast serve` of the tests: the real tritonserver, its processes and what it says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from volcast.runtime.client import Client

SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Served:
    """A running `volcast serve`, and the lines it has told."""

    process: subprocess.Popen[str]
    http: int
    grpc: int
    port: int
    metrics: int
    lines: list[str] = field(default_factory=list)
    news: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self.news:
                self.lines.append(line)
                self.news.notify_all()

    def wait(self, text: str, count: int = 1) -> None:
        with self.news:
            said = self.news.wait_for(lambda: sum(text in line for line in self.lines) >= count, 120)
        assert said, "".join(self.lines)

    def ready(self) -> None:
        """Wait until the server answers, which an earlier test may have ended: the supervisor starts it again."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10).close()
                if self.told("ready:") > self.told("restarting tritonserver"):
                    return
            time.sleep(0.05)
        raise AssertionError("".join(self.lines))

    def told(self, text: str) -> int:
        """How many lines hold `text`."""
        with self.news:
            return sum(text in line for line in self.lines)

    def stop(self) -> int:
        """As a person does; the exit code."""
        self.process.terminate()
        code = self.process.wait(60)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    def end(self) -> None:
        """Nothing of it is left, whatever it does."""
        server = self.processes("triton")
        self.process.kill()
        for one in server:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def signal(self, name: str, number: int) -> None:
        """To each of the server's processes whose command holds `name`."""
        found = self.processes(name)
        assert found
        for one in found:
            os.kill(one, number)

    def client(self, **settings: Any) -> Client:
        return Client(f"127.0.0.1:{self.grpc}", **settings)

    def shared_memory(self) -> list[Path]:
        return list(SHARED_MEMORY.glob(f"volcast_{self.process.pid}_*"))

    def asked(self) -> int:
        """How many requests the server has ended, the supervisor's two a second among them."""
        url = f"http://127.0.0.1:{self.http}/v2/models/gaussian/stats"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return int(json.load(answer)["model_stats"][0]["inference_count"])

    def processes(self, name: str) -> list[int]:
        """The ids of the server's processes whose command holds `name`."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
                command = (folder / "cmdline").read_bytes().decode()
            except (OSError, ValueError):
                continue
            if name in command and session in self.sessions():
                found.append(int(folder.name))
        return found

    def sessions(self) -> set[int]:
        # A server leads a session of its own; its parent is this process.
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return {int(child) for task in tasks for child in task.read_text().split()}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(artifact: Path, *more: str) -> Served:
    http, grpc, metrics, port = free_ports(4)
    command = [sys.executable, "-m", "volcast", "serve", str(artifact), "--port", str(port), "--http-port", str(http), "--grpc-port",
               str(grpc), "--metrics-port", str(metrics), "--engine", "onnxruntime", "--threads", "1", "--drain", "5", *more]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    served = Served(process, http, grpc, port, metrics)
    threading.Thread(target=served.read, daemon=True).start()
    return served
