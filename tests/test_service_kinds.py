"""Token models and one-pass models as a service answers out of them, in this process: against their own `sample`."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generator_bundles import LABELS
from test_service import Gated, Heard, given, tickets, until
from token_bundles import CODES, DEEP, Tiny

from volcast import _core
from volcast.runtime.batching import Turns
from volcast.runtime.generator_model import GeneratorModel
from volcast.runtime.interface import inputs, text_of
from volcast.runtime.pipeline import load
from volcast.runtime.probe import warm_up
from volcast.runtime.queueing import Queueing
from volcast.runtime.request import OnStep
from volcast.runtime.service import Service
from volcast.runtime.token_model import TokenModel
from volcast.runtime.volume import Volume

CONTEXT = np.random.default_rng(3).normal(size=(3, 8)).astype(np.float32)
LENGTH = 12
SHAPE = (16, 32, 8)
MASK = np.random.default_rng(4).integers(0, len(LABELS), SHAPE)


@pytest.fixture
def tokens(tiny_tokens: Callable[[Tiny], Path]) -> Iterator[tuple[TokenModel, Service]]:
    """At most four samples are open; no token is drawn while the engine's gate is closed."""
    model = load(tiny_tokens(DEEP) / "artifact", engine=Gated(), active=1, queue=3)
    service = Service(model, most=8)
    yield model, service
    model.engine.gate.set()
    service.close()


@pytest.fixture
def one_pass(spade: Path) -> Iterator[tuple[GeneratorModel, Service]]:
    model = load(spade, engine="onnxruntime", threads=1)
    service = Service(model)
    yield model, service
    service.close()


def asked(**values: Any) -> dict[str, np.ndarray]:
    numbers = {name: np.array([values.pop(name)]) for name in ("temperature", "top_p") if name in values}
    return {**given(**values), **numbers, "context": CONTEXT}


def test_token_samples_are_those_of_sample_many(tokens: tuple[TokenModel, Service]) -> None:
    model, service = tokens
    heard = Heard()
    how: dict[str, Any] = {"temperature": 5.0, "top_k": 7, "top_p": 0.98}
    service.accept(asked(seed=5, first_sample=1, num_samples=2, output_format="float32", **how), heard)
    assert heard.ended.wait(60) and heard.ends == [("done", "")] and heard.kinds() == ["volume"] * 2
    expected = list(model.sample_many(3, 5, condition={"context": CONTEXT}, **how))[1:]
    assert np.ptp(expected[0].array) > 0 and (expected[0].array != expected[1].array).any()
    for answer in heard.sent:
        wanted = expected[int(answer["sample"][0])]
        np.testing.assert_array_equal(answer["volume_float32"], wanted.array)
        np.testing.assert_array_equal(answer["affine"], wanted.affine)


def test_progress_comes_token_by_token_and_is_counted(tokens: tuple[TokenModel, Service]) -> None:
    _, service = tokens
    heard = Heard()
    service.accept(asked(seed=1, progress_every=1), heard)
    assert heard.ended.wait(60) and heard.kinds() == ["progress"] * LENGTH + ["volume"]
    told = [(int(one["step"][0]), int(one["steps"][0])) for one in heard.sent[:-1]]
    assert told == [(done, LENGTH) for done in range(1, LENGTH + 1)]
    totals = service.totals()
    assert totals["volcast_steps_total", ""] == totals["volcast_network_calls_total", "1"] == LENGTH
    assert totals["volcast_volumes_total", ""] == 1 and totals["volcast_active_samples", ""] == 0
    assert [phase for phase, _ in service.take_seconds()] == ["first_step", "steps", "decode"]


def held(model: TokenModel, service: Service, samples: int, **named: int) -> Heard:
    """A request whose first token waits for the gate."""
    model.engine.gate.clear()
    heard = Heard()
    service.accept({**asked(seed=1, num_samples=samples), **tickets(**named)}, heard)
    until(lambda: model.queueing.stats().active == 1)
    return heard


def test_a_ticket_ends_a_sample_between_two_tokens(tokens: tuple[TokenModel, Service]) -> None:
    model, service = tokens
    heard, word, after = held(model, service, 3, ticket=7), Heard(), Heard()
    until(lambda: model.queueing.stats().queued == 2)
    service.accept(tickets(cancel=7), word)
    assert heard.ends == [("cancelled", "[request] cancelled")] and word.ends == [("done", "")]
    service.accept(asked(seed=2), after)
    model.engine.gate.set()
    assert after.ended.wait(60) and after.ends == [("done", "")]
    # One token of the three samples, and all of the other's.
    assert model.queueing.steps == 1 + LENGTH and not heard.sent


def test_deadlines_hold_for_who_waits_and_who_is_under_way(tokens: tuple[TokenModel, Service]) -> None:
    model, service = tokens
    deadline = {"deadline_s": np.array([0.05], np.float32)}
    model.engine.gate.clear()
    first, second = Heard(), Heard()
    for heard in (first, second):
        service.accept({**asked(seed=1), **deadline}, heard)
    until(lambda: (model.queueing.stats().active, model.queueing.stats().queued) == (1, 1))
    time.sleep(0.06)
    model.engine.gate.set()
    for heard, where in ((first, f"after 1 of {LENGTH} steps"), (second, "before its first step")):
        assert heard.ended.wait(60)
        ((reason, text),) = heard.ends
        assert (
            reason == "unavailable"
            and where in text
            and "deadline cannot be met any more; give it more seconds" in text
        )


def test_too_many_are_refused_with_a_hint(tokens: tuple[TokenModel, Service]) -> None:
    model, service = tokens
    first = Heard()
    service.accept(asked(seed=3), first)  # takes less than the hint tells apart
    assert first.ended.wait(60)
    heard, more = held(model, service, 4), Heard()
    until(lambda: model.queueing.stats().queued == 3)
    service.accept(asked(seed=2), more)
    assert more.ended.wait(60) and more.ends[0][0] == "unavailable"
    hint = re.search(r"retry in ([\d.]+) s$", more.ends[0][1])
    assert hint is not None and float(hint[1]) >= 0.1
    model.engine.gate.set()
    assert heard.ended.wait(60) and heard.ends == [("done", "")]


def test_a_sample_that_failed_tells_nothing_of_how_long_the_next_takes() -> None:
    gate, queueing = threading.Event(), Queueing(1)

    def job(_: OnStep) -> Volume:
        assert gate.wait(60)
        raise ValueError("enough")

    gate.set()
    assert isinstance(queueing.submit(job, Turns(), None).exception(60), ValueError)
    until(lambda: queueing.stats().active == 0)
    gate.clear()
    queueing.submit(job, Turns(), None)
    with pytest.raises(_core.Overloaded) as caught:
        queueing.submit(job, Turns(), None)
    assert caught.value.retry_s == 1.0  # as before any
    gate.set()
    queueing.close(drain=True)


def test_a_higher_priority_goes_first_and_equals_as_they_came(tiny_tokens: Callable[[Tiny], Path]) -> None:
    model = load(tiny_tokens(DEEP) / "artifact", engine=Gated())
    ended: list[str] = []
    model.engine.gate.clear()
    futures = []
    for name, priority in (("running", 0), ("first", 0), ("urgent", 8), ("second", 0), ("last", -1)):
        future = model.submit(1, condition={"context": CONTEXT}, turns=Turns(priority=priority))
        future.add_done_callback(lambda _, name=name: ended.append(name))
        futures.append(future)
        until(lambda: model.queueing.stats().active == 1)
    model.engine.gate.set()
    assert all(future.result(60).array.shape == futures[0].result(60).array.shape for future in futures)
    model.close()
    assert ended == ["running", "urgent", "first", "second", "last"]


def test_submit_refuses_at_once_and_close_ends_what_waits(tiny_tokens: Callable[[Tiny], Path]) -> None:
    model = load(tiny_tokens(DEEP) / "artifact", engine=Gated(), active=1, queue=1)
    condition: dict[str, Any] = {"condition": {"context": CONTEXT}}
    for wrong, message in [
        ({"sample": -1}, "sample=-1: need 0..999999"), ({"seed": -1}, "seed=-1"), ({"top_p": 2.0}, "top_p=2.0"),
        ({"condition": {}}, "context is missing"), ({"turns": Turns(priority=9)}, "priority=9: need -8..8"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.submit(**{**condition, **wrong})
    model.engine.gate.clear()
    futures = [model.submit(1, **condition) for _ in range(2)]
    with pytest.raises(_core.Overloaded, match="2 samples wait already") as caught:
        model.submit(1, **condition)
    assert caught.value.retry_s > 0
    assert futures[1].cancel()
    # The sample that has begun waits for the gate, and `close` for it: the gate opens once `close` has begun.
    futures[0].cancel()
    model.engine.gate.set()
    model.close()
    assert all("cancelled" in str(future.exception(60)) for future in futures)
    with pytest.raises(ValueError, match="closed"):
        model.submit(1, **condition)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_a_callback_raises_ends_its_sample_alone(
    tiny_tokens: Callable[[Tiny], Path], error: type[BaseException]
) -> None:
    def stop(done: int, total: int) -> None:
        raise error("enough")

    with load(tiny_tokens(DEEP) / "artifact", engine="onnxruntime", threads=1) as model:
        failed = model.submit(1, condition={"context": CONTEXT}, on_step=stop)
        fine = model.submit(1, sample=2, condition={"context": CONTEXT})
        assert isinstance(failed.exception(60), error)
        expected = list(model.sample_many(3, 1, condition={"context": CONTEXT}))[2]
        np.testing.assert_array_equal(fine.result(60).array, expected.array)
    with pytest.raises(ValueError, match="closed"):
        model.submit(1, condition={"context": CONTEXT})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": np.array([5], np.int32)}, "unknown input 'steps'; known: seed, num_samples, first_sample, temperature, top_k, top_p"),
        ({"temperature": np.array([0.0])}, "temperature=0.0: need a number above 0; for the most probable token"),
        ({"top_k": np.array([CODES + 1], np.int32)}, f"top_k={CODES + 1}: need 1..{CODES}"),
        ({"top_p": np.array([1.5])}, "top_p=1.5: need above 0, at most 1"),
        ({"top_p": np.array([0.5], np.float32)}, r"top_p is float32 \[1\]: need float64 \[1\]"),
        ({"context": np.zeros((2, 8), np.float32)}, r"context is float32 \[2, 8\]: need float32 \[3, 8\]"),
    ],
)  # fmt: skip
def test_what_a_token_model_does_not_take_is_refused_by_name(
    tokens: tuple[TokenModel, Service], wrong: dict[str, np.ndarray], message: str
) -> None:
    _, service = tokens
    heard = Heard()
    service.accept({**asked(seed=1), **wrong}, heard)
    assert heard.ended.wait(60)
    with pytest.raises(ValueError, match=message):
        raise ValueError(heard.ends[0][1])
    assert heard.ends[0][0] == "invalid"


def test_close_answers_what_is_open(tokens: tuple[TokenModel, Service]) -> None:
    model, service = tokens
    heard = Heard()
    service.accept(asked(seed=1, num_samples=3), heard)
    service.close()
    assert heard.ends == [("done", "")] and heard.kinds() == ["volume"] * 3
    assert model.queueing.stats().queued == 0


@pytest.mark.parametrize("kind", ["tokens", "one_pass"])
def test_the_warm_up_makes_a_volume(kind: str, request: pytest.FixtureRequest) -> None:
    model, service = request.getfixturevalue(kind)
    warm_up(service, model.spec)
    assert service.totals()["volcast_volumes_total", ""] == 1


def test_one_pass_samples_have_the_mask_and_the_style(one_pass: tuple[GeneratorModel, Service]) -> None:
    model, service = one_pass
    style = np.random.default_rng(5).random(SHAPE).astype(np.float32)
    for image in (None, style):
        heard = Heard()
        tensors = {**given(seed=3, num_samples=2, output_format="float32", progress_every=1), "mask": MASK}
        service.accept(tensors | ({} if image is None else {"image": image}), heard)
        assert heard.ended.wait(60) and heard.ends == [("done", "")]
        assert heard.kinds() == ["progress", "volume"] * 2
        expected = list(model.sample_many(2, 3, condition={"mask": MASK}, image=image))
        assert (expected[0].array != expected[1].array).any()
        for answer in heard.sent:
            if text_of(answer["kind"]) == "volume":
                wanted = expected[int(answer["sample"][0])]
                np.testing.assert_array_equal(answer["volume_float32"], wanted.array)
    assert service.totals()["volcast_steps_total", ""] == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": np.array([1.0])}, "unknown input 'temperature'; known: seed"),
        ({"strength": np.array([1.0], np.float32)}, "unknown input 'strength'"),
        ({"mask": MASK + 1}, "mask has unknown labels 6"),
        ({"mask": MASK[1:]}, "axis o0 is 16 here"),
        ({"image": np.zeros((8, 8, 8), np.float32)}, r"got float32 \(8, 8, 8\): need finite numbers"),
    ],
)
def test_what_a_one_pass_model_does_not_take_is_refused_by_name(
    one_pass: tuple[GeneratorModel, Service], wrong: dict[str, np.ndarray], message: str
) -> None:
    _, service = one_pass
    heard = Heard()
    service.accept({**given(seed=1), "mask": MASK, **wrong}, heard)
    assert heard.ended.wait(60) and heard.ends[0][0] == "invalid"
    with pytest.raises(ValueError, match=message):
        raise ValueError(heard.ends[0][1])


def test_each_kind_has_its_own_settings(
    tokens: tuple[TokenModel, Service], one_pass: tuple[GeneratorModel, Service]
) -> None:
    names = [{one.name for one in inputs(model.spec)} for model, _ in (tokens, one_pass)]
    shared = {
        "seed", "num_samples", "first_sample", "priority", "deadline_s", "progress_every", "ticket", "cancel",
        "output_format", "region",
    }  # fmt: skip
    assert names[0] - shared == {"temperature", "top_k", "top_p", "context"}
    assert names[1] - shared == {"image", "mask"} and shared <= names[0] & names[1]
    for model, _ in (tokens, one_pass):  # `Queueing` takes them in order
        assert "-8..8, higher ones first, default 0" in [one.text for one in inputs(model.spec)]
