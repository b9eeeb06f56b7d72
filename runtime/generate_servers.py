"""Workers as requests to Triton servers (`volcast serve`): a slot is a thread that has one request under way.

A server makes the bits of a local worker with its artifact, engine and threads, which it tells and is held to. Conditions
travel resolved, as whole arrays: a field's number would be rounded to float32 before and not after what is made of it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, final

from .answers import unpack_volume
from .artifact import read_manifest
from .client import Client, Unavailable
from .conditions import named, resolve
from .exchange import retry_s
from .frame import place_of
from .generate_worker import (
    FAULTS,
    Crew,
    Died,
    Event,
    Failed,
    Finished,
    Made,
    Ready,
    Recipe,
    Task,
    fault,
    keep,
)
from .interface import text_of
from .request import make_request
from .sizes import default_sizes
from .spec import ArtifactSpec
from .volume import Volume

AT_ONCE = 8
"""Requests to a server: its steps are shared, and its decoder and the network have work meanwhile."""
WAIT_S, ASK_S, HANG_S = 30.0, 5.0, 20.0
"""For a server that is not there: it may be restarting. Between two probes of one that is; until one counts as a hang."""


@final
class Servers(Crew):
    """Slot i asks the server number i modulo their count."""

    def __init__(self, recipe: Recipe, servers: Sequence[str]) -> None:
        self._recipe, self._servers = recipe, servers
        self._spec = read_manifest(recipe.artifact)
        self._happened: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._tasks: dict[int, queue.SimpleQueue[Task | None]] = {}
        self._clients: dict[int, Client] = {}
        self._hung: dict[int, str] = {}
        self._known = threading.Lock()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, args=(server,), daemon=True) for server in set(servers)
        ]
        for thread in self._threads:
            thread.start()

    def hire(self, slot: int) -> None:
        self._tasks[slot] = queue.SimpleQueue()
        thread = threading.Thread(target=self._work, args=(slot, self._tasks[slot]), daemon=True)
        self._threads.append(thread)
        thread.start()

    def give(self, slot: int, task: Task) -> None:
        self._tasks[slot].put(task)

    def events(self, timeout: float | None) -> list[Event]:
        with suppress(queue.Empty):
            return [self._happened.get(timeout=timeout)]
        return []

    def close(self) -> None:
        self._closed.set()
        for tasks in self._tasks.values():
            tasks.put(None)
        with self._known:
            for client in self._clients.values():
                client.close()  # ends the request under way
        for thread in self._threads:
            thread.join()

    def _work(self, slot: int, tasks: queue.SimpleQueue[Task | None]) -> None:
        event: Event
        with Client(self._servers[slot % len(self._servers)]) as client:
            with self._known:
                self._clients[slot] = client
            try:
                self._meet(client, slot)
                self._happened.put(Ready(slot=slot))
                while (task := tasks.get()) is not None and not self._closed.is_set():
                    self._happened.put(Finished(slot=slot, made=self._make(client, task)))
                return
            except (Unavailable, TimeoutError, CancelledError) as error:
                event = Died(slot=slot, reason=fault(error))
            except FAULTS as error:
                event = Failed(slot=slot, reason=fault(error))
            finally:
                with self._known:
                    del self._clients[slot]
                    hung = self._hung.pop(slot, None)
            self._happened.put(event if hung is None else Died(slot=slot, reason=hung))

    def _meet(self, client: Client, slot: int) -> None:
        """Wait until the server is there and tells what it serves. ValueError: something else than is wanted."""
        end = time.monotonic() + WAIT_S
        while True:
            try:
                told = client.parameters(ASK_S)
                break
            except (Unavailable, TimeoutError):
                if time.monotonic() > end or self._closed.wait(0.25):
                    raise
        server, recipe = self._servers[slot % len(self._servers)], self._recipe
        if told.get("artifact_sha256") != recipe.artifact_sha256:
            raise ValueError(
                f"[generate] {server} serves another artifact than {recipe.artifact}; serve this one with `volcast serve`"
            )
        engine, threads = _made_with(told)
        if (engine, threads) != (recipe.engine, recipe.threads):
            raise ValueError(
                f"[generate] {server} samples with {engine} and {threads} threads, not {recipe.engine} and "
                f"{recipe.threads}, whose bits may differ; serve it with these, or choose another folder"
            )

    def _make(self, client: Client, task: Task) -> Made:
        recipe, condition = self._recipe, self._recipe.condition(task)
        given = {
            **recipe.settings, **self._arrays(task), "seed": recipe.seed, "first_sample": task.sample,
            "output_format": "float32",
        }  # fmt: skip
        # A diffusion model's files lie in the middle, as a local worker's do.
        diffusion = isinstance(self._spec, ArtifactSpec)
        place = None if diffusion else place_of(self._spec, "generate", None, [condition])
        while True:
            try:
                volume: Volume | None = None
                for tensors in client.answers(given):
                    if text_of(tensors["kind"]) == "volume":
                        volume = unpack_volume(tensors)
                        if place is not None:
                            volume = Volume(volume.array, place.affine, place.spacing_mm)
                if volume is None:
                    raise Unavailable(f"[generate] sample {task.sample}: the server ended without its volume")
                return keep(recipe, self._spec, task, volume)
            except Unavailable as error:
                pause = retry_s(error)
                if pause is None or self._closed.wait(pause):
                    raise

    def _arrays(self, task: Task) -> dict[str, Any]:
        """The conditions, resolved."""
        recipe, spec = self._recipe, self._spec
        if not isinstance(spec, ArtifactSpec):
            return dict(resolve(spec, recipe.condition(task), default_sizes(spec)).values)
        job = recipe.job(spec, make_request(spec, recipe.seed, recipe.settings), task)
        other = job.unconditional[0] if job.unconditional else {}
        negative = {f"negative_{one.name}": other[one.name] for one in named(spec, recipe.negative)}
        return {**job.conditional[0], **negative}

    def _watch(self, server: str) -> None:
        """A server that hangs never answers: who waits for it is freed."""
        while not self._closed.wait(ASK_S):
            with self._known:
                slots = [slot for slot in self._clients if self._servers[slot % len(self._servers)] == server]
            if not slots:
                continue
            reason: str | None = None
            with Client(server) as client:
                try:
                    client.probe(HANG_S)
                except (OSError, ValueError, CancelledError) as error:
                    reason = fault(error)
            with self._known:
                for slot in slots:
                    if reason is not None and slot in self._clients:
                        self._hung[slot] = reason
                        self._clients[slot].close()


def served_with(servers: Sequence[str]) -> tuple[str, int]:
    """Engine and threads of the first of the servers that answers. ValueError: none does, or it does not tell."""
    reasons = []
    for server in servers:
        with Client(server) as client:
            try:
                return _made_with(client.parameters(ASK_S))
            except (Unavailable, TimeoutError) as error:
                reasons.append(fault(error))
    raise ValueError(f"[generate] no server answers ({reasons[0]}); start one: volcast serve")


def _made_with(told: dict[str, str]) -> tuple[str, int]:
    engine, threads = told.get("engine", "auto"), told.get("threads", "")
    if engine == "auto":
        raise ValueError("[generate] the server does not tell its engine; serve with `volcast serve`")
    return engine, int(threads or 1)
