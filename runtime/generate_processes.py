"""Workers as processes of this machine, started afresh ("spawn": engines' threads do not survive a fork)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, final

from .generate_worker import FAULTS, Crew, Died, Event, Failed, Finished, Ready, Recipe, Task, Worker, fault


@final
class Processes(Crew):
    """A pipe to each process. A process whose parent is gone ends at once, whatever it does."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._context = multiprocessing.get_context("spawn")
        self._open: dict[int, tuple[SpawnProcess, Connection[Any, Any]]] = {}
        self._unborn: list[Event] = []
        # It lets signals through when it starts, which `hire` must not meet halfway.
        resource_tracker.ensure_running()

    def hire(self, slot: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._recipe), daemon=True)
        # A terminal's Ctrl-C goes to every process: blocked here, it stays so in the child, and only the parent stops.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        except BrokenPipeError:
            self._unborn.append(Died(slot=slot, reason="it ended before it began"))
            return
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._open[slot] = process, ours

    def give(self, slot: int, task: Task) -> None:
        try:
            self._open[slot][1].send(task)
        except OSError:
            pass  # it is dead: its end of the pipe tells `events`

    def events(self, timeout: float | None) -> list[Event]:
        if self._unborn:
            happened, self._unborn = self._unborn, []
            return happened
        slots = {pipe: slot for slot, (_, pipe) in self._open.items()}
        return [self._event(slots[pipe]) for pipe in connection.wait(list(slots), timeout)]  # type: ignore[index]

    def close(self) -> None:
        for process, _ in self._open.values():
            process.kill()
        for process, pipe in self._open.values():
            process.join()
            pipe.close()
        self._open.clear()

    def _event(self, slot: int) -> Event:
        process, pipe = self._open[slot]
        try:
            # What a dying process sent whole is read before its end shows, and half a message is no message.
            kind, value = pipe.recv()
        except (EOFError, OSError):
            del self._open[slot]
            process.kill()
            process.join()
            pipe.close()
            return Died(slot=slot, reason=f"exit code {process.exitcode}")
        if kind == "ready":
            return Ready(slot=slot)
        return Finished(slot=slot, made=value) if kind == "made" else Failed(slot=slot, reason=value)


def _work(pipe: Connection[Any, Any], recipe: Recipe) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        worker = Worker(recipe)
        try:
            worker.load()
            pipe.send(("ready", None))
            while True:
                pipe.send(("made", worker.make(pipe.recv())))
        except BrokenPipeError:
            raise
        except FAULTS as error:
            pipe.send(("failed", fault(error)))
    except (EOFError, BrokenPipeError):
        pass  # nobody waits for the answer any more


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
