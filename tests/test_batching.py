"""Futures over a shared loop: the volumes of `Model.sample`, bit for bit, whatever runs beside them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest

from volcast.runtime.batching import Expired, Turns
from volcast.runtime.engine import Arrays, Engine, Program
from volcast.runtime.engine_onnxruntime import OnnxRuntimeEngine
from volcast.runtime.pipeline import Model, load
from volcast.runtime.spec import ProgramSpec


@final
class Counting(Engine):
    """ONNX Runtime that counts the calls of each program."""

    name, threads = "counting", 1

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        return Counted(OnnxRuntimeEngine(1).open(path, program, sizes), self.calls, path.stem)


@final
class Counted(Program):
    def __init__(self, program: Program, calls: Counter[str], name: str) -> None:
        self._program, self._calls, self._name = program, calls, name

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        self._calls[self._name] += 1
        return self._program(inputs)


@pytest.fixture
def model(gaussian: Path) -> Any:
    opened = load(gaussian, engine="onnxruntime")
    yield opened
    opened.close()


def test_a_future_gives_the_volume_of_sample(model: Model) -> None:
    asked = [
        {"steps": 5 + 3 * n, "scheduler": ("ddim", "pndm", "ddpm", "dpm-solver++")[n % 4],
         "guidance": (None, 2.0)[n % 2], "condition": {"anterior": n / 10}}
        for n in range(8)
    ]  # fmt: skip
    futures = [model.submit(n, **one) for n, one in enumerate(asked)]  # type: ignore[arg-type]
    for n, (one, future) in enumerate(zip(asked, futures, strict=True)):
        volume, alone = future.result(60), model.sample(n, **one)  # type: ignore[arg-type]
        np.testing.assert_array_equal(volume.array, alone.array)
        np.testing.assert_array_equal(volume.affine, alone.affine)
        assert volume.spacing_mm == alone.spacing_mm
    assert future.seconds.keys() == {"first_step", "steps", "decode"}


def test_one_request_can_ask_for_a_later_sample_of_its_seed(model: Model) -> None:
    *_, last = model.sample_many(3, 7, steps=4)
    np.testing.assert_array_equal(model.submit(7, sample=2, steps=4).result(60).array, last.array)


def test_what_the_network_is_shown_of_a_plan_is_made_once_for_a_request(gaussian: Path) -> None:
    engine = Counting()
    with load(gaussian, engine=engine) as model:
        futures = [model.submit(7, sample=n, steps=5) for n in range(3)]
        other = model.submit(7, steps=6)
        assert engine.calls["schedule"] == 2
        last = [*model.sample_many(3, 7, steps=5), model.sample(7, steps=6)]
        for future, volume in zip([*futures, other], last, strict=True):
            np.testing.assert_array_equal(future.result(60).array, volume.array)


def test_an_image_can_be_where_a_future_starts(model: Model) -> None:
    image = model.sample(3)
    asked = {"image": image, "strength": 0.5, "steps": 10}
    future = model.submit(4, **asked)  # type: ignore[arg-type]
    alone = model.sample(4, **asked)  # type: ignore[arg-type]
    np.testing.assert_array_equal(future.result(60).array, alone.array)


def test_steps_and_previews_are_told_in_order(model: Model) -> None:
    steps: list[tuple[int, int]] = []
    previews: list[tuple[int, tuple[int, ...]]] = []
    future = model.submit(
        1, steps=50, on_step=lambda done, total: steps.append((done, total)),
        on_preview=lambda done, images: previews.append((done, images.shape)), preview_every=10,
    )  # fmt: skip
    future.result(60)
    assert steps[-1] == (50, 50) and steps == sorted(steps)
    assert previews and all(done % 10 == 0 and shape == (1, 1, 8, 12, 8) for done, shape in previews)


def test_a_cancelled_future_says_so(model: Model) -> None:
    begun = threading.Event()
    future = model.submit(1, steps=1000, on_step=lambda *_: begun.set())
    assert begun.wait(60) and future.cancel()
    with pytest.raises(CancelledError, match="of 1000 steps"):
        future.result(60)
    assert not future.cancel()


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_what_a_callback_raises_ends_its_sample_alone(model: Model, error: type[BaseException]) -> None:
    def refuse(done: int, total: int) -> None:
        raise error("enough")

    bad, good = model.submit(1, steps=300, on_step=refuse), model.submit(2, steps=3)
    with pytest.raises(error, match="enough"):
        bad.result(60)
    good.result(60)


def test_a_deadline_that_cannot_be_met_is_named(model: Model) -> None:
    model.submit(0, steps=20).result(60)
    with pytest.raises(Expired, match="deadline"):
        model.submit(1, steps=1000, turns=Turns(deadline_s=1e-4)).result(60)


def test_bad_requests_are_refused_before_they_wait(model: Model) -> None:
    for settings, message in [
        ({"steps": 0}, "steps=0"),
        ({"condition": {"anterior": 2}}, "anterior=2"),
        ({"sample": -1}, "sample=-1"),
        ({"turns": Turns(priority=99)}, "priority=99"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.submit(0, **settings)  # type: ignore[arg-type]


def test_closing_ends_the_threads_and_what_was_under_way(gaussian: Path) -> None:
    before = {thread.ident for thread in threading.enumerate()}
    with load(gaussian, engine="onnxruntime") as model:
        future = model.submit(1, steps=1000)
    with pytest.raises(CancelledError):
        future.result(60)
    assert {thread.ident for thread in threading.enumerate()} <= before
    with pytest.raises(ValueError, match="closed"):
        model.submit(1)


def test_steps_are_counted_once_and_never_back(model: Model) -> None:
    counts: list[int] = []

    def look(*_: Any) -> None:
        assert model.batching is not None
        counts.append(model.batching.steps)
        time.sleep(
            0.002
        )  # so that several steps are taken meanwhile: the preview comes behind the progress of a later one

    model.submit(1, steps=200, on_step=look, on_preview=look, preview_every=7).result(60)
    assert counts == sorted(counts)
    assert model.batching is not None and model.batching.steps == 200
