"""Requests answered out of the shared loop, in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest

from volcast.runtime.engine import Arrays, Engine, Program
from volcast.runtime.engine_onnxruntime import OnnxRuntimeEngine
from volcast.runtime.interface import as_bytes, text_of
from volcast.runtime.pipeline import load
from volcast.runtime.service import Reason, Reply, Service
from volcast.runtime.spec import ProgramSpec


class Heard(Reply):
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.sent: list[Mapping[str, np.ndarray]] = []
        self.ends: list[tuple[str, str]] = []
        self.began, self.ended, self.gone = threading.Event(), threading.Event(), False

    def send(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.sent.append(tensors)
        self.began.set()

    def finish(self) -> None:
        self.ends.append(("done", ""))
        self.ended.set()

    def fail(self, reason: Reason, text: str) -> None:
        self.ends.append((reason, text))
        self.ended.set()

    def cancelled(self) -> bool:
        return self.gone

    def kinds(self) -> list[str]:
        return [text_of(one["kind"]) for one in self.sent]


@final
class Gated(Engine):
    """ONNX Runtime whose steps wait for `gate`."""

    name, threads = "gated", 1

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        opened = OnnxRuntimeEngine(1).open(path, program, sizes)
        return GatedProgram(opened, self.gate) if path.stem == "step" else opened


@final
class GatedProgram(Program):
    def __init__(self, program: Program, gate: threading.Event) -> None:
        self._program, self._gate = program, gate

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        assert self._gate.wait(60)
        return self._program(inputs)


@pytest.fixture
def opened(gaussian: Path) -> Any:
    model = load(gaussian, engine=Gated(), active=2, queue=4)
    service = Service(model, most=6)
    yield model, service
    service.close()


def given(**values: int | str) -> dict[str, np.ndarray]:
    return {
        name: as_bytes(value)
        if isinstance(value, str)
        else np.array([value], "uint64" if name == "seed" else "int32")
        for name, value in values.items()
    }


def test_samples_of_a_request_are_those_of_sample_many(opened: Any) -> None:
    model, service = opened
    heard = Heard()
    service.accept(given(seed=5, num_samples=3, steps=9, output_format="float32"), heard)
    assert heard.ended.wait(60) and heard.ends == [("done", "")] and heard.kinds() == ["volume"] * 3
    for answer in heard.sent:
        expected = list(model.sample_many(3, 5, steps=9))[int(answer["sample"][0])]
        np.testing.assert_array_equal(answer["volume_float32"], expected.array)
        np.testing.assert_array_equal(answer["affine"], expected.affine)
        assert answer["seed"][0] == 5


def test_the_first_sample_may_be_any(opened: Any) -> None:
    model, service = opened
    heard, past = Heard(), Heard()
    service.accept(given(seed=5, first_sample=2, num_samples=2, steps=9, output_format="float32"), heard)
    assert heard.ended.wait(60) and heard.kinds() == ["volume"] * 2
    expected = list(model.sample_many(4, 5, steps=9))[2:]
    for answer in heard.sent:
        np.testing.assert_array_equal(answer["volume_float32"], expected[int(answer["sample"][0])].array)
    service.accept(given(first_sample=999_999, num_samples=2), past)
    assert past.ends == [("invalid", "[request] first_sample=999999: need 0..999998")]


def test_a_drawn_seed_is_answered(opened: Any) -> None:
    model, service = opened
    heard = Heard()
    service.accept(given(steps=4, output_format="float32"), heard)
    assert heard.ended.wait(60)
    (answer,) = heard.sent
    again = model.sample(int(answer["seed"][0]), steps=4)
    np.testing.assert_array_equal(answer["volume_float32"], again.array)


def test_progress_and_previews_come_before_the_volume(opened: Any) -> None:
    _, service = opened
    heard = Heard()
    service.accept(given(seed=1, steps=40, progress_every=1, preview_every=10), heard)
    assert heard.ended.wait(60) and heard.kinds()[-1] == "volume"
    for kind in ("progress", "preview"):
        steps = [int(one["step"][0]) for one in heard.sent if text_of(one["kind"]) == kind]
        assert steps and steps == sorted(steps) and steps[-1] == {"progress": 40, "preview": 30}[kind]
    assert all(one["volume_float16"].shape == (8, 12, 8) for one in heard.sent if "affine" in one)


def held(model: Any, service: Service, samples: int) -> Heard:
    """A request of many samples that cannot step until the gate opens; all have been submitted or refused."""
    first, heard = Heard(), Heard()
    service.accept(given(seed=1, steps=2), first)  # opens the programs, which takes calls
    assert first.ended.wait(60)
    model.engine.gate.clear()
    service.accept(given(seed=1, num_samples=samples, steps=1000), heard)
    until(lambda: model._batching.stats().submitted == 1 + min(samples, 6))
    return heard


def until(true: Callable[[], bool]) -> None:
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within a minute")


def test_who_has_gone_frees_the_places(opened: Any) -> None:
    model, service = opened
    heard = held(model, service, 6)
    heard.gone = True
    (request,) = service._open.values()
    until(lambda: request.error is not None)
    model.engine.gate.set()
    assert heard.ended.wait(60) and heard.ends == [("cancelled", "[request] cancelled")]
    assert not heard.sent and model._batching.stats().cancelled == 6


def tickets(**values: int) -> dict[str, np.ndarray]:
    return {name: np.array([value], np.uint64) for name, value in values.items()}


def test_a_ticket_cancels_without_waiting_for_the_step(opened: Any) -> None:
    model, service = opened
    other = held(model, service, 2)
    heard, word = Heard(), Heard()
    service.accept({**given(seed=2, steps=900, num_samples=2), **tickets(ticket=7)}, heard)
    until(lambda: model.batching.stats().submitted == 5)
    service.accept(tickets(cancel=7), word)
    # No step is taken: the gate is closed.
    assert heard.ends == [("cancelled", "[request] cancelled")] and word.ends == [("done", "")]
    service.accept(tickets(cancel=7), word)
    model.engine.gate.set()
    until(lambda: model.batching.stats().cancelled == 2 and len(service._open) <= 1)
    assert len(heard.ends) == 1 and not heard.sent
    other.gone = True
    assert other.ended.wait(60)


def test_a_cancellation_may_come_before_its_request(opened: Any) -> None:
    _, service = opened
    heard, word, next_one = Heard(), Heard(), Heard()
    service.accept(tickets(cancel=2**64 - 1), word)
    service.accept({**given(steps=5), **tickets(ticket=2**64 - 1)}, heard)
    assert word.ends == [("done", "")]
    assert heard.ended.wait(60) and heard.ends == [("cancelled", "[request] cancelled")]
    service.accept({**given(steps=5), **tickets(ticket=3)}, next_one)
    assert next_one.ended.wait(60) and next_one.ends == [("done", "")]
    assert not service._tickets


def test_too_much_is_refused_with_a_hint(opened: Any) -> None:
    model, service = opened
    first, heard = held(model, service, 5), Heard()
    service.accept(given(seed=1, num_samples=2, steps=1000), heard)
    until(lambda: model._batching.stats().refused == 1)
    model.engine.gate.set()
    assert heard.ended.wait(60) and not heard.sent
    ((reason, text),) = heard.ends
    assert reason == "unavailable" and "retry in" in text
    first.gone = True
    assert first.ended.wait(60) and model._batching.stats().cancelled == 6


def test_more_volumes_than_there_are_places_are_not_asked_to_come_again(opened: Any) -> None:
    _, service = opened
    heard = Heard()
    service.accept(given(num_samples=7), heard)
    ((reason, text),) = heard.ends
    assert reason == "invalid" and "7 volumes: ask for at most 6 at once" in text


def test_bad_requests_are_told_at_once(opened: Any) -> None:
    _, service = opened
    for tensors, text in [
        (given(steps=0), "steps=0"),
        ({"anterior": np.array([2.0], np.float32)}, "anterior=2"),
    ]:
        heard = Heard()
        service.accept(tensors, heard)
        assert heard.ended.wait(60) and heard.ends[0][0] == "invalid" and text in heard.ends[0][1]


def test_close_answers_what_is_open_and_refuses_the_rest(gaussian: Path) -> None:
    before = set(threading.enumerate())
    service = Service(load(gaussian, engine="onnxruntime"))
    heard, late = Heard(), Heard()
    service.accept(given(seed=2, num_samples=4, steps=300), heard)
    service.close()
    assert heard.ends == [("done", "")] and heard.kinds() == ["volume"] * 4
    service.accept(given(seed=2), late)
    assert late.ends == [("unavailable", "[request] the server stops")]
    for _ in range(100):
        if set(threading.enumerate()) <= before:
            break
        time.sleep(0.05)
    assert set(threading.enumerate()) <= before
