"""A tritonserver that is kept alive: started, asked whether it still answers, restarted, stopped without traces."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from volcast.runtime.interface import Array

from .installation import Installation
from .pulse import Pulse

SHARED_MEMORY = Path("/dev/shm")
PROBE_S, LOAD_S = 0.5, 600.0
"""Between probes; for a start."""
AT_ONCE, STEADY_S = 5, 60.0
"""So many faults in that time are mended at once; after each further one the pause doubles, up to 30 s."""
IDLE_S = 5.0
"""A stopping server that has nothing left to do is given so long. Release 24.10 keeps a request open for ever whose caller
goes away in the moment in which an answer is sent, and would take the whole of its time."""
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
        first: Mapping[str, Array],
        tell: Callable[[str], None],
        *,
        drain_s: int = 30,
    ) -> None:
        """
        Args:
            first: inputs of a request that a server must answer before it counts as ready.
            tell: gets a line for what happens: ready, restarted, stopped.
            drain_s: for requests under way at a stop.
        """
        self._installation, self._repository, self._model = installation, repository, model
        self._ports, self._first, self._tell, self._drain_s = ports, first, tell, drain_s
        self._prefix = f"volcast_{os.getpid()}_{_namespace()}_"
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        """Serve until `stop`. Raises ValueError: the first start fails; later ones are tried again."""
        self._ports.check()
        _sweep()
        faults: deque[float] = deque()
        served = False
        while not self._stop.is_set():
            server = self._start()
            pulse = Pulse(server, self._model, grpc=self._ports.grpc, metrics=self._ports.metrics)
            try:
                reason = self._wait_ready(pulse)
                if reason is None and not self._stop.is_set():
                    served = True
                    self._tell(
                        f"ready: {self._model} on http 127.0.0.1:{self._ports.http}, grpc 127.0.0.1:{self._ports.grpc}"
                    )
                    reason = self._watch(pulse)
                elif not served and not self._stop.is_set():
                    raise ValueError(f"[serve] tritonserver did not start: {reason}; see the lines above")
            finally:
                self._end(server, pulse)
            if reason is not None:
                pause = self._pause(faults)
                self._tell(f"restarting tritonserver in {pause:g} s: {reason}")
                self._stop.wait(pause)
        self._tell("stopped")

    def _pause(self, faults: deque[float]) -> float:
        """Seconds before the next start; `faults`: the times of the last ones."""
        now = time.monotonic()
        faults.append(now)
        while now - faults[0] > STEADY_S:
            faults.popleft()
        return 0.0 if len(faults) <= AT_ONCE else min(30.0, 2.0 ** (len(faults) - AT_ONCE - 1))

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

    def _wait_ready(self, pulse: Pulse) -> str | None:
        """Until the model gives a volume: why it does not; None: it does, or `stop`."""
        end = time.monotonic() + LOAD_S
        fault = pulse.fault()
        while fault is not None and not self._stop.is_set():
            if pulse.ended or time.monotonic() > end:
                return fault
            self._stop.wait(0.1)
            fault = pulse.fault()
        return pulse.samples(self._first, max(0.0, end - time.monotonic()), self._stop.is_set)

    def _watch(self, pulse: Pulse) -> str | None:
        """Until a fault, which it names, or `stop`: None."""
        while not self._stop.wait(PROBE_S):
            fault = pulse.fault()
            if fault is not None:
                return fault
        return None

    def _end(self, server: subprocess.Popen[bytes], pulse: Pulse) -> None:
        if self._stop.is_set() and not pulse.ended:
            server.terminate()
            end, idle = time.monotonic() + self._drain_s + 5, 0.0
            while not pulse.ended and time.monotonic() < end and idle < IDLE_S:
                idle = idle + 0.25 if pulse.idle() else 0.0
                with suppress(subprocess.TimeoutExpired):
                    server.wait(0.25)
        # Also the model's processes of a server that is gone. After a fault nobody is waited for: callers try again.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        for file in SHARED_MEMORY.glob(f"{self._prefix}*"):
            file.unlink(missing_ok=True)


def _namespace() -> str:
    """Of the process ids: containers that share /dev/shm have ids of their own."""
    return os.readlink("/proc/self/ns/pid").strip("pid:[]")


def _sweep() -> None:
    """Remove what servers left that nobody could stop."""
    for file in SHARED_MEMORY.glob(f"volcast_*_{_namespace()}_*"):
        process = file.name.split("_")[1]
        if process.isdecimal() and not Path("/proc", process).exists():
            file.unlink(missing_ok=True)
