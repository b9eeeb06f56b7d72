"""A tritonserver that is kept alive: started, asked whether it still answers, restarted, stopped without traces."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from volcast.runtime.client import Client

from .installation import Installation

SHARED_MEMORY = Path("/dev/shm")
PROBE_S, HANG_S, LOAD_S = 0.5, 10.0, 600.0
"""Between probes; until one counts as a hang; for a start."""
STEADY_S = 60.0
"""After that long without a fault the back-off starts over."""
_FOLLOW = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
"""PR_SET_PDEATHSIG: no server outlives us, however we end."""


@final
@dataclass(frozen=True, kw_only=True)
class Ports:
    """On the loopback address: the wheel's server dies from some malformed requests, so that nobody else may reach it."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def check(self) -> None:
        """ValueError: a port is out of range, given twice or in use."""
        ports = (self.http, self.grpc, self.metrics)
        if len(set(ports)) < 3:
            raise ValueError(f"[serve] ports {ports}: need three different ones")
        for port in ports:
            with socket.socket() as probe:
                # As the server does: a port that was in use a moment ago may be taken.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except (OSError, OverflowError) as error:
                    raise ValueError(f"[serve] port {port}: {error}; choose another one") from error


@final
class Supervisor:
    """Runs one tritonserver over one model repository. `run` belongs to one thread, `stop` to any."""

    def __init__(
        self,
        installation: Installation,
        repository: Path,
        model: str,
        ports: Ports,
        tell: Callable[[str], None],
        *,
        drain_s: int = 30,
    ) -> None:
        """`tell` gets a line for what happens: ready, restarted, stopped. `drain_s`: for requests under way at a stop."""
        self._installation, self._repository, self._model = installation, repository, model
        self._ports, self._tell, self._drain_s = ports, tell, drain_s
        self._prefix = f"volcast_{os.getpid()}_"
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        """Serve until `stop`. Raises ValueError: the first start fails; later ones are tried again."""
        self._ports.check()
        faults, began = 0, 0.0
        while not self._stop.is_set():
            server = self._start()
            try:
                if self._wait_ready(server):
                    began = time.monotonic()
                    self._tell(
                        f"ready: {self._model} on http 127.0.0.1:{self._ports.http}, grpc 127.0.0.1:{self._ports.grpc}"
                    )
                    reason = self._watch(server)
                elif self._stop.is_set():
                    reason = None
                elif not began:
                    raise ValueError(
                        f"[serve] tritonserver did not start (exit code {server.poll()}); see the lines above"
                    )
                else:
                    reason = "it did not start"
            finally:
                self._end(server)
            if reason is not None:
                faults = 0 if time.monotonic() - began > STEADY_S else faults + 1
                pause = 0.0 if faults <= 1 else min(30.0, 2.0 ** (faults - 2))
                self._tell(f"restarting tritonserver in {pause:g} s: {reason}")
                self._stop.wait(pause)
        self._tell("stopped")

    def _start(self) -> subprocess.Popen[bytes]:
        ports, local = self._ports, "127.0.0.1"
        command = [
            str(self._installation.binary), f"--model-repository={self._repository}",
            f"--backend-directory={self._installation.backends}", "--disable-auto-complete-config",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}", "--model-control-mode=none",
            f"--http-address={local}", f"--http-port={ports.http}", f"--grpc-address={local}",
            f"--grpc-port={ports.grpc}", f"--metrics-address={local}", f"--metrics-port={ports.metrics}",
            "--log-info=false", "--log-warning=false", f"--exit-timeout-secs={self._drain_s}",
        ]  # fmt: skip
        environment = {**os.environ, **self._installation.environment}
        return subprocess.Popen(
            [sys.executable, "-ISc", _FOLLOW, *command], env=environment, stdin=subprocess.DEVNULL, stdout=2,
            start_new_session=True,
        )  # fmt: skip

    def _wait_ready(self, server: subprocess.Popen[bytes]) -> bool:
        end = time.monotonic() + LOAD_S
        while server.poll() is None and time.monotonic() < end and not self._stop.is_set():
            if self._fault() is None:
                return True
            self._stop.wait(0.1)
        return False

    def _watch(self, server: subprocess.Popen[bytes]) -> str | None:
        """Until a fault, which it names, or `stop`: None."""
        while not self._stop.wait(PROBE_S):
            code = server.poll()
            if code is not None:
                return f"it ended with code {code}"
            fault = self._fault()
            if fault is not None:
                return fault
        return None

    def _fault(self) -> str | None:
        with Client(f"127.0.0.1:{self._ports.grpc}", self._model) as client:
            return client.fault(HANG_S)

    def _end(self, server: subprocess.Popen[bytes]) -> None:
        if server.poll() is None:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(self._drain_s + 5 if self._stop.is_set() else 1.0)
        # Also the model's processes of a server that is gone.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        for file in SHARED_MEMORY.glob(f"{self._prefix}*"):
            file.unlink(missing_ok=True)
