"""A contestant in a process of its own, driven over a pipe: clean imports, clean memory, one at work at a time."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from volcast.runtime.memory import PeakMemory

from .contestant import Clock, Contestant, Round, Task

GRACE_S = 10
"""How long a worker may take to end by itself, which lets torch.compile clean up."""


class Failed(Exception):
    """The contestant cannot run here; the message is one line without paths."""


@final
@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contestant by the name that the table shows and where its class (or function of a Task) stands."""

    name: str
    module: str
    function: str
    options: tuple[tuple[str, str | bool], ...] = ()

    def load(self) -> Callable[[Task], Any]:
        """Import it; only its worker does."""
        function = getattr(import_module(self.module), self.function)
        return lambda task: function(task, **dict(self.options))


@final
class Worker:
    """The parent's side. Use it as a context manager: its process, and what that started, end with the block."""

    def __init__(self, entry: Entry, task: Task) -> None:
        self.name = entry.name
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, entry, task), daemon=False)
        self._process.start()
        self.pid = self._process.pid or 0
        self._stuck = False
        there.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        if kind is None and not self._stuck:
            self._stop()
        if self._process.is_alive():
            try:
                # The group: torch.compile's compilers are children of the worker.
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._process.kill()
        self._process.join()
        self._pipe.close()

    def _stop(self) -> None:
        try:
            self._pipe.send("stop")
        except OSError:
            return
        self._process.join(GRACE_S)

    def open(self, limit_s: float) -> None:
        """Wait until it is loaded; torch.compile compiles at the first volume instead.

        Raises:
            ValueError: bad input, as the contestant says it.
            Failed: it cannot run, or needed more than `limit_s` seconds.
        """
        self._receive(limit_s)

    def volume(self, limit_s: float | None = None) -> tuple[Round, NDArray[np.float32]]:
        """One volume `[C, D, H, W]` and what it cost; the errors of `open`."""
        try:
            self._pipe.send("volume")
        except OSError as error:
            raise self._ended() from error
        measured: tuple[Round, NDArray[np.float32]] = self._receive(limit_s)
        return measured

    def _receive(self, limit_s: float | None) -> Any:
        if not self._pipe.poll(limit_s):
            self._stuck = True
            raise Failed(f"not done after {limit_s:g} s")
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if kind == "input":
            raise ValueError(value)
        if kind == "failed":
            raise Failed(value)
        return value

    def _ended(self) -> Failed:
        self._process.join()
        return Failed(f"its process ended with code {self._process.exitcode}")


def one_line(error: BaseException) -> str:
    """The error's type and the start of its message, paths left out: results are published."""
    text = re.sub(r"(?<![\w./])~?(/[\w.+\-]+)+/?", "PATH", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _serve(pipe: Connection, entry: Entry, task: Task) -> None:
    # A group of its own: the parent alone answers Ctrl-C, and ends the group.
    os.setpgid(0, 0)
    # stdout belongs to the table or the JSON.
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    try:
        contestant = entry.load()(task)
        pipe.send(("opened", None))
        while pipe.recv() == "volume":
            pipe.send(("volume", _measure(contestant)))
    except (EOFError, BrokenPipeError):
        return
    except ValueError as error:
        # torch raises ValueError as well; ours begin with the operation.
        pipe.send(("input", str(error)) if str(error).startswith("[") else ("failed", one_line(error)))
    except Exception as error:  # noqa: BLE001  whatever stops a peer becomes its row in the table
        pipe.send(("failed", one_line(error)))


def _measure(contestant: Contestant) -> tuple[Round, NDArray[np.float32]]:
    memory, clock = PeakMemory(), Clock()
    began = time.perf_counter()
    volume = contestant.volume(clock)
    total = time.perf_counter() - began
    return (
        Round(
            total_s=total,
            prepare_s=clock.seconds["prepare"],
            network_s=clock.seconds["network"],
            decode_s=clock.seconds["decode"],
            peak_bytes=memory.bytes(),
            device_bytes=clock.device_bytes,
        ),
        volume,
    )
