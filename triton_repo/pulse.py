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
        self._asked = 0.0
        self._ran: dict[int, int] = {}

    @property
    def ended(self) -> bool:
        return self._server.poll() is not None

    def fault(self) -> str | None:
        """Why the model does not answer, None: it does, or may yet. Asks for `_ASK_S` at most."""
        code = self._server.poll()
        if code is not None:
            return f"it ended with code {code}"
        began, ran = time.monotonic(), self._cpu()
        with Client(self._address, self._model) as client:
            try:
                client.probe(_ASK_S)
            except TimeoutError as error:
                return str(error) if self._hang(began, ran) else None
            except (ValueError, Unavailable, CancelledError) as error:
                return str(error)
        self._asked = 0.0
        return None

    def _hang(self, began: float, ran: dict[int, int]) -> bool:
        """Whether it is one that no probe since the first unanswered one was answered."""
        if not self._asked:
            self._asked, self._ran = began, ran
        waited, now = time.monotonic() - self._asked, self._cpu()
        # A machine that is busy, or was itself stopped, lets every process run a little in a second probe's time.
        still = any(now.get(one) == ticks for one, ticks in self._ran.items())
        return waited > (STILL_S - 0.5 if still else HANG_S)

    def samples(self, tensors: Mapping[str, Array], stopped: Callable[[], bool]) -> str | None:
        """Ask for a volume, for as long as it takes: why none comes; None: one does, or `stopped` has become true."""
        with Client(self._address, self._model) as client:
            found: list[str] = []

            def ask() -> None:
                try:
                    kinds = [text_of(answer["kind"]) for answer in client.answers(tensors)]
                    found.append("" if "volume" in kinds else f"it answers {kinds}")
                except (ValueError, Unavailable, CancelledError) as error:
                    found.append(str(error))

            thread = threading.Thread(target=ask, name="volcast samples", daemon=True)
            thread.start()
            while thread.is_alive() and not self.ended and not stopped():
                thread.join(0.05)
        thread.join()
        return None if stopped() else found[0] or None

    def idle(self) -> bool:
        """Whether the model says that it has answered all that it was asked."""
        try:
            with urllib.request.urlopen(self._url, timeout=_ASK_S) as answer:
                lines = answer.read().decode().splitlines()
        except (OSError, http.client.HTTPException):
            return False
        told = [line.rpartition(" ")[2] for line in lines if line.startswith("volcast_open_requests")]
        return [float(number) for number in told] == [0.0]

    def _cpu(self) -> dict[int, int]:
        """Processor time (ticks) of each process of the server's session."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._server.pid:
                    found[int(folder.name)] = int(fields[11]) + int(fields[12])
        return found
