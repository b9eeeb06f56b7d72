"""`AsyncClient`, shared memory and metrics over the real tritonserver."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import Served

from volcast import AsyncClient
from volcast.runtime.client import Unavailable
from volcast.runtime.exchange import Messages
from volcast.runtime.metrics import METRICS
from volcast.runtime.pipeline import Model, load
from volcast.runtime.region import FOLDER

LONG: dict[str, Any] = {"steps": 1000, "size": [16, 16, 16]}
"""64 of these take seconds on any machine."""


@pytest.fixture(scope="module")
def model(gaussian: Path) -> Iterator[Model]:
    with load(gaussian, engine="onnxruntime", threads=1) as opened:
        yield opened


def client(served: Served, **settings: Any) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{served.grpc}", **settings)


def until(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within a minute")


def metrics(served: Served) -> dict[str, float]:
    """volcast's own, by name and label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{served.metrics}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^(volcast_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        own = [word for word in labels.split(",") if not re.match("model=|version=", word)]
        assert 'model="gaussian"' in labels
        found[name + "".join(f" {word}" for word in own)] = float(value)
    return found


def idle(served: Served) -> dict[str, float]:
    """Its metrics, once no request is under way. They come four times a second: not those from before."""
    now = time.time()
    with served.client() as asking:
        asking.sample(1, steps=1)
    until(lambda: metrics(served)["volcast_last_volume_timestamp_seconds"] >= now)
    until(lambda: metrics(served)["volcast_open_requests"] == 0)
    return metrics(served)


def regions() -> list[Path]:
    return list(FOLDER.glob("volcast-region-*"))


def test_what_was_sent_is_not_kept(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    request = Messages.request

    def kept(self: Messages, given: Any) -> Any:
        made.append(request(self, given))
        return made[-1]

    monkeypatch.setattr(Messages, "request", kept)

    async def ask() -> None:
        given = {"seed": 1, "steps": 1000, "size": [16, 16, 16], "num_samples": 64, "progress_every": 1}
        async with client(served) as asking, aclosing(asking.answers(given)) as answers:
            async for _ in answers:
                if sys.getrefcount(made[0]) <= 2:  # the list's and the call's
                    return
        raise AssertionError("all volumes have come")

    asyncio.run(ask())


@pytest.mark.parametrize("shared_memory", [False, True])
def test_many_at_once_have_the_bits_of_sample(served: Served, model: Model, shared_memory: bool) -> None:
    async def ask() -> list[Any]:
        async with client(served, shared_memory=shared_memory) as asking:
            return await asyncio.gather(
                *(asking.sample(seed, steps=3 + 7 * seed, guidance=(None, 2.0)[seed % 2]) for seed in range(8))
            )  # fmt: skip

    for seed, volume in enumerate(asyncio.run(ask())):
        alone = model.sample(seed, steps=3 + 7 * seed, guidance=(None, 2.0)[seed % 2])
        np.testing.assert_array_equal(volume.array, alone.array)
        np.testing.assert_array_equal(volume.affine, alone.affine)


@pytest.mark.parametrize("form", ["float32", "float16", "uint16"])
def test_shared_memory_carries_what_messages_carry(served: Served, model: Model, form: Any) -> None:
    image = model.sample(1)
    asked: dict[str, Any] = {"image": image, "strength": 0.5, "steps": 6, "output_format": form}
    steps: list[tuple[int, int]] = []
    with served.client() as plain, served.client(shared_memory=True) as shared:
        expected = plain.sample_many(3, 2, **asked)
        volumes = shared.sample_many(3, 2, on_step=lambda done, total: steps.append((done, total)), **asked)
    for volume, other in zip(volumes, expected, strict=True):
        np.testing.assert_array_equal(volume.array, other.array)
        np.testing.assert_array_equal(volume.affine, other.affine)
        assert volume.array.flags.writeable
    assert steps[-1] == (9, 9)  # strength 0.5: the last three of six steps
    until(lambda: not regions())


def test_a_region_is_gone_after_an_error_and_after_a_cancel(served: Served) -> None:
    class Enough(Exception):
        pass

    def stop(*_: int) -> None:
        raise Enough

    with served.client(tries=1, shared_memory=True) as asking:
        with pytest.raises(Enough):
            asking.sample_many(64, 1, on_step=stop, **LONG)
        with pytest.raises(ValueError, match="steps=0"):
            asking.sample(1, steps=0)
    until(lambda: not regions())
    with served.client(tries=1) as asking, pytest.raises(ValueError, match="need the name of a region"):
        list(asking.answers({"region": "../../etc/passwd"}))


def test_a_cancelled_task_cancels_its_request(served: Served) -> None:
    async def ask() -> None:
        begun = asyncio.Event()
        async with client(served, tries=1) as asking:
            task = asyncio.ensure_future(asking.sample_many(64, 1, on_step=lambda *_: begun.set(), **LONG))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    before = idle(served)
    asyncio.run(ask())
    name = 'volcast_requests_total outcome="cancelled"'
    until(lambda: metrics(served)[name] > before[name])
    after = idle(served)
    assert after[name] == before[name] + 1 and after["volcast_queue_length"] == 0
    assert after["volcast_volumes_total"] < before["volcast_volumes_total"] + 64


def test_what_a_callback_raises_and_what_the_server_refuses(served: Served) -> None:
    async def ask() -> None:
        def stop(done: int, volume: Any) -> None:
            raise KeyError(done)

        async with client(served, tries=1) as asking:
            with pytest.raises(KeyError):
                await asking.sample_many(64, 1, on_preview=stop, preview_every=1, **LONG)
            with pytest.raises(ValueError, match="anterior=2.*need 0..1"):
                await asking.sample(condition={"anterior": 2})
            with pytest.raises(ValueError, match="unknown input 'eta'"):
                await asking.sample(eta=0.5)
        async with AsyncClient("127.0.0.1:1", tries=2) as nobody:
            with pytest.raises(Unavailable, match="127.0.0.1:1"):
                await nobody.sample(1)
        with socket.create_server(
            ("127.0.0.1", 0)
        ) as silent:  # a timeout on the real server cuts a stream: it may die of that
            async with AsyncClient(f"127.0.0.1:{silent.getsockname()[1]}") as asking:
                with pytest.raises(TimeoutError, match="in time"):
                    await asking.sample(1, timeout_s=0.2)

    asyncio.run(ask())


def test_the_metrics_count_what_was_done(served: Served) -> None:
    before = idle(served)
    with served.client() as asking:
        asking.sample_many(3, 1, steps=5)
        asking.sample(1, steps=4, guidance=2.0)
    after = idle(served)  # whose own sample counts: one step
    change = {name: value - before.get(name, 0) for name, value in after.items()}
    assert change['volcast_requests_total outcome="done"'] == 3
    assert change["volcast_volumes_total"] == 5
    assert change["volcast_steps_total"] == 3 * 5 + 4 + 1
    assert change["volcast_network_entries_total"] == 3 * 5 + 2 * 4 + 1
    calls = {
        int(found[1]): count
        for name, count in change.items()
        if (found := re.fullmatch(r'volcast_network_calls_total batch="(\d+)"', name))
    }
    assert sum(size * count for size, count in calls.items()) == 3 * 5 + 2 * 4 + 1
    for phase in ("first_step", "steps", "decode"):
        assert change[f'volcast_volume_seconds_count phase="{phase}"'] == 5
    assert {one.name for one in METRICS} == {
        re.sub("(_bucket|_count|_sum)? .*|$", "", name) for name in after
    }
