"""Whether a tritonserver lives: its processes, its answers, what it still has to do."""

from __future__ import annotations

import http.client
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path
from typing import final

from volcast.runtime.client import Client, Unavailable
from volcast.runtime.interface import Array, text_of

STILL_S, HANG_S = 4.0, 30.0
"""Without an answer: a hang if one of the processes has not run meanwhile; a hang whatever they do."""
_ASK_S = 2.0


@final
class Pulse:
    """Of one server process and the model processes that it has started; not for two threads."""

    def __init__(self, server: subprocess.Popen[bytes], model: str, *, grpc: int, metrics: int) -> None:
        """`grpc`, `metrics`: ports on the loopback address."""
        self._server, self._model = server, model
        self._address, self._url = f"127.0.0.1:{grpc}", f"http://127.0.0.1:{metrics}/metrics"
        self._children: set[int] = set()
        self._asked = 0.0
        self._ran: dict[int, int] = {}

    @property
    def ended(self) -> bool:
        return self._server.poll() is not None

    def fault(self) -> str | None:
        """Why the model does not answer, None: it does, or may yet. Asks for `_ASK_S` at most."""
        fault = self._lost()
        if fault is not None:
            return fault
        began, ran = time.monotonic(), self._ticks()
        with Client(self._address, self._model) as client:
            try:
                client.probe(_ASK_S)
            except TimeoutError as error:
                return str(error) if self._hangs(began, ran) else None
            except (ValueError, Unavailable, CancelledError) as error:
                return self._lost() or str(error)
        self._asked = 0.0
        self._children = self._children or _session(self._server.pid)
        return None

    def _lost(self) -> str | None:
        """Which process is gone: with requests under way Triton does not tell that a model's is."""
        code = self._server.poll()
        if code is not None:
            return f"it ended with code {code}"
        gone = self._children - self._ticks().keys()
        return f"its model's process {min(gone)} ended" if gone else None

    def _hangs(self, began: float, ran: dict[int, int]) -> bool:
        """Of a probe that was not answered since `began`: whether it is one that no later one would change."""
        if any((_stat(one) or " ")[0] in "Tt" for one in (self._server.pid, *self._children)):
            return True  # stopped by a signal
        if not self._asked:
            self._asked, self._ran = began, ran
        waited, now = time.monotonic() - self._asked, self._ticks()
        # A machine that is busy, or was itself stopped, lets every process run a little in a second probe's time.
        still = any(now.get(one) == ticks for one, ticks in self._ran.items())
        return waited > (STILL_S - 0.5 if still else HANG_S)

    def samples(
        self, tensors: Mapping[str, Array], limit_s: float, stopped: Callable[[], bool]
    ) -> str | None:
        """Ask for a volume: why none comes within `limit_s`; None: one does, or `stopped` has become true."""
        found: list[str] = []
        end = time.monotonic() + limit_s
        with Client(self._address, self._model) as client:

            def ask() -> None:
                try:
                    kinds = [text_of(answer["kind"]) for answer in client.answers(tensors)]
                    found.append("" if "volume" in kinds else f"it answers {kinds}")
                except (ValueError, Unavailable, CancelledError) as error:
                    found.append(str(error))

            thread = threading.Thread(target=ask, name="volcast samples", daemon=True)
            thread.start()
            while thread.is_alive() and self._lost() is None and not stopped() and time.monotonic() < end:
                thread.join(0.05)
            lost = self._lost()
        thread.join()
        late = f"no volume within {limit_s:g} s"
        return None if stopped() else lost or (late if time.monotonic() > end else found[0]) or None

    def idle(self) -> bool:
        """Whether the model says that it has answered all that it was asked."""
        try:
            with urllib.request.urlopen(self._url, timeout=_ASK_S) as answer:
                lines = answer.read().decode().splitlines()
        except (OSError, http.client.HTTPException):
            return False
        told = [line.rpartition(" ")[2] for line in lines if line.startswith("volcast_open_requests")]
        return [float(number) for number in told] == [0.0]

    def _ticks(self) -> dict[int, int]:
        """Processor time of each process that lives."""
        read = {one: _stat(one) for one in (self._server.pid, *self._children)}
        return {one: int(stat[11]) + int(stat[12]) for one, stat in read.items() if stat and stat[0] != "Z"}


def _stat(process: int) -> list[str]:
    """Its /proc/PID/stat from the state on (man 5 proc); empty: there is none."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return []


def _session(leader: int) -> set[int]:
    """The other processes of the session that `leader` leads."""
    processes = {int(folder.name) for folder in Path("/proc").glob("[0-9]*")} - {leader}
    return {one for one in processes if (stat := _stat(one)) and int(stat[3]) == leader}
