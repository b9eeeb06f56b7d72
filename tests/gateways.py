"""A gateway in this process, on a port of its own, before the tests' server."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from served import Served

from volcast.runtime.artifact import read_artifact
from volcast.triton_repo.gateway.application import Application
from volcast.triton_repo.gateway.server import Gateway
from volcast.triton_repo.gateway.settings import Limits, Listening

GENERATE = "/v1/models/gaussian/generate"
LONG: dict[str, Any] = {"steps": 1000, "size": [16, 16, 16], "num_samples": 64, "progress_every": 1}
"""64,000 steps: nothing that the tests wait for takes as long."""
EVENTS = {"accept": "text/event-stream"}
LIMITS = Limits(rate=1e6)


@contextmanager
def gateway(artifact: Path, served: Served, *, drain_s: float = 30, **settings: Any) -> Iterator[Gateway]:
    settings = {
        "grpc": f"127.0.0.1:{served.grpc}",
        "triton_metrics": f"127.0.0.1:{served.metrics}",
        "limits": LIMITS,
        **settings,
    }
    listening = settings.pop("listening", Listening(port=0))
    running = Gateway(
        listening, Application(read_artifact(artifact), "gaussian", **settings), drain_s=drain_s
    )
    running.start()
    try:
        yield running
    finally:
        running.hurry()
        running.stop()


def events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    """(name, value) of the events as they come; ("", None) for a sign of life."""
    name = ""
    for line in response.iter_lines():
        key, _, value = line.partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield name, json.loads(value)
        elif line.startswith(":"):
            yield "", None


def until(condition: Callable[[], Any]) -> Any:
    """What `condition` gives, once it gives something; it has a minute."""
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def counted(client: httpx.Client, name: str) -> float:
    """The sum of a metric's samples, or of the one whose labels stand in `name`."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{re.escape(name)}[ {{]", line))
