"""Workers as actors of a Ray cluster. Every machine sees the artifact and the dataset's folder under the same paths."""

from __future__ import annotations

import logging
import socket
import time
from importlib.util import find_spec
from typing import Any, final

from .generate_worker import FAULTS, Crew, Died, Event, Failed, Finished, Ready, Recipe, Task, Worker, fault


@final
class RayActors(Crew):
    """One actor a worker. Ray restarts none: who replaces them is `generate.run`, as it does processes."""

    def __init__(self, recipe: Recipe, address: str, gpus: int) -> None:
        if find_spec("ray") is None:
            raise ValueError("[generate] ray is not installed; pip install 'volcast[ray]'")
        import ray

        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        self._ray = ray
        self._recipe = recipe
        self._class = ray.remote(num_cpus=recipe.threads, num_gpus=gpus, max_restarts=0)(Worker)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}

    def cpus(self) -> int:
        """Of the whole cluster."""
        return int(self._ray.cluster_resources().get("CPU", 0))

    def hire(self, slot: int) -> None:
        self._actors[slot] = self._class.remote(self._recipe)
        self._pending[self._actors[slot].load.remote()] = slot

    def give(self, slot: int, task: Task) -> None:
        self._pending[self._actors[slot].make.remote(task)] = slot

    def events(self, timeout: float | None) -> list[Event]:
        if not self._pending:
            time.sleep(timeout or 0)
            return []
        done, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        return [self._event(reference) for reference in done]

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._ray.shutdown()

    def _event(self, reference: Any) -> Event:
        slot = self._pending.pop(reference)
        try:
            made = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, FAULTS):
                raise
            return Failed(slot=slot, reason=fault(error.cause))
        except self._ray.exceptions.RayError as error:
            self._ray.kill(self._actors.pop(slot))
            self._pending = {other: of for other, of in self._pending.items() if of != slot}
            return Died(slot=slot, reason=fault(error)[:200])
        return Ready(slot=slot) if made is None else Finished(slot=slot, made=made)


def _reach(address: str) -> None:
    """Ray itself would try for minutes. A word such as "auto" names no machine and passes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"[generate] ray={address}: no cluster answers there ({error}); start one: ray start --head"
        ) from error
