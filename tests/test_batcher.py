"""Step-level batching: every sample's bits are those of the loop alone, whatever shares its network calls."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from volcast import _core

SHAPE, ROW = (2, 3, 4), 2
H = _core.Happened
ENDS = (H.FINISHED, H.CANCELLED, H.EXPIRED, H.FAILED)


def plan(steps: int, method: str = "ddim") -> _core.Plan:
    schedule, prediction = _core.linear_beta(1000, 1e-4, 2e-2), _core.Prediction.EPSILON
    if method == "pndm":
        return _core.make_pndm(schedule, _core.Steps(steps), prediction, skip_prk_steps=True)
    if method == "ddpm":
        return _core.make_ddpm(
            schedule, _core.Steps(steps), prediction, clip=None, variance=_core.Variance.FIXED_SMALL
        )
    return _core.make_ddim(schedule, _core.Steps(steps), prediction, clip=None, eta=0.3, reverse=False)


def rows_of(p: _core.Plan) -> np.ndarray:
    """[steps, 2]: anything that differs from step to step."""
    return np.stack([np.sin(p.timesteps), np.cos(p.timesteps)], 1).astype(np.float32)


def network(x: np.ndarray, row: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Sample by sample the same float32 operations, whatever the batch."""
    r, k = (a.reshape(len(x), -1, 1, 1) for a in (row[:, :1], c))
    return np.ascontiguousarray(np.float32(0.5) * x + r * k)


class Served:
    """A batcher with one group; `before` is called with every batch's arrays."""

    def __init__(
        self, counts: tuple[int, ...] = (1, 2, 4), before: Callable[..., None] = lambda x, row, c: None, **limits: int
    ) -> None:  # fmt: skip
        self.batcher = _core.Batcher(**limits)
        lanes = []
        for count in counts:
            x, row, c = (np.zeros((count, *shape), np.float32) for shape in (SHAPE, (ROW,), (1,)))

            def call(x: Any = x, row: Any = row, c: Any = c) -> np.ndarray:
                before(x, row, c)
                return network(x, row, c)

            lanes.append((x, row, [c], call))
        self.group = self.batcher.add_group(lanes)

    def submit(self, p: _core.Plan, seed: int, c: float = 1.0, **options: Any) -> int:
        x = _core.normal(np.full(1, seed, np.uint64), np.zeros(1, np.uint64), 0, SHAPE, np.dtype(np.float32))
        other = [np.zeros(1, np.float32)] if options.get("guidance") is not None else []
        return self.batcher.submit(
            self.group, p, x, rows_of(p), [np.full(1, c, np.float32)], other, seed=seed, sample=0, **options
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.batcher.run)
        thread.start()
        try:
            yield
        finally:
            self.batcher.close(drain=False)
            thread.join()

    def ends(self, count: int) -> dict[int, _core.BatchEvent]:
        found: dict[int, _core.BatchEvent] = {}
        until = time.monotonic() + 60
        while len(found) < count:
            assert time.monotonic() < until, f"{len(found)} of {count} ended"
            for event in self.batcher.wait(1.0):
                if event.happened in ENDS:
                    assert event.id not in found, "ended twice"
                    found[event.id] = event
        return found


def alone(
    p: _core.Plan, seed: int, c: float = 1.0, guidance: float | None = None, **known: np.ndarray
) -> np.ndarray:
    """The loop without a batcher."""
    seeds, samples = np.full(1, seed, np.uint64), np.zeros(1, np.uint64)
    x = _core.normal(seeds, samples, 0, SHAPE, np.dtype(np.float32))
    rows = rows_of(p)

    def denoiser(step: int, x: np.ndarray, branch: _core.Branch) -> np.ndarray:
        value = 0.0 if branch == _core.Branch.UNCONDITIONAL else c
        return network(x, rows[step : step + 1], np.full((1, 1), value, np.float32))

    _core.run(p, x, denoiser, seeds, samples, guidance=guidance, **known)  # type: ignore[arg-type]
    return x.ravel()


@pytest.mark.parametrize("counts", [(1,), (1, 2, 4), (1, 3)])
def test_a_sample_has_the_loops_bits_whatever_shares_its_calls(counts: tuple[int, ...]) -> None:
    served = Served(counts)
    asked: dict[int, tuple[Any, ...]] = {}
    plans = [plan(3), plan(11), plan(7, "pndm"), plan(5, "ddpm")]
    with served.running():
        for n in range(24):
            p, guidance = plans[n % 4], (None, 2.5, 0.0)[n % 3]
            asked[served.submit(p, n, c=n / 7, guidance=guidance)] = (p, n, n / 7, guidance)
        ends = served.ends(24)
    for number, (p, seed, c, guidance) in asked.items():
        assert ends[number].happened == H.FINISHED
        np.testing.assert_array_equal(ends[number].x, alone(p, seed, c, guidance))
    stats = served.batcher.stats()
    entries = sum(len(p) * (1 if guidance is None else 2) for p, _, _, guidance in asked.values())
    assert (stats.finished, stats.entries) == (24, entries)
    assert sum(count * calls for count, calls in stats.calls_of.items()) == entries
    assert set(stats.calls_of) <= set(counts) and max(stats.calls_of) == max(counts)


def gated() -> tuple[Served, list[float], threading.Event]:
    """Calls of one sample that wait for the gate, and the conditions in the order of the calls."""
    order: list[float] = []
    gate = threading.Event()

    def before(x: Any, row: Any, c: Any) -> None:
        gate.wait(30)
        order.append(float(c[0, 0]))

    return Served((1,), before), order, gate


def test_a_short_sample_passes_long_ones_and_none_starves() -> None:
    served, order, gate = gated()
    long, short = plan(50), plan(5)
    with served.running():
        for n in range(7):
            served.submit(long, n, c=float(n))
        served.submit(short, 8, c=100.0)
        gate.set()
        served.ends(8)
    # With shares of 1/remaining, and the seven others at 1/50 each, its fifth turn comes within 3 times 5 turns.
    last = max(i for i, c in enumerate(order) if c == 100.0)
    assert last + 1 <= 15
    # Equal samples take turns: when the first ends, none of the others is more than one step behind another.
    ended = max(i for i, c in enumerate(order) if c == order[-1])
    counts = Counter(order[: order.index(100.0) + 200])
    shares = [counts[float(n)] for n in range(7)]
    assert ended == len(order) - 1 and max(shares) - min(shares) <= 1


def test_priority_doubles_the_share() -> None:
    served, order, gate = gated()
    with served.running():
        served.submit(plan(100), 0, c=0.0)
        served.submit(plan(100), 1, c=1.0, priority=1)
        gate.set()
        served.ends(2)
    first = Counter(order[:60])
    assert 1.7 <= first[1.0] / first[0.0] <= 2.6


def test_a_cancelled_sample_ends_before_its_next_step_and_leaves_its_mates_alone() -> None:
    served = Served()
    seen = threading.Event()
    with served.running():
        mate = served.submit(plan(30), 1)
        lost = served.submit(plan(1000), 2)
        events: dict[int, Any] = {}
        while len(events) < 2:
            for event in served.batcher.wait(1.0):
                if event.id == lost and event.happened == H.PROGRESS and not seen.is_set():
                    seen.set()
                    assert served.batcher.cancel(lost)
                if event.happened in ENDS:
                    events[event.id] = event
        assert not served.batcher.cancel(lost) and not served.batcher.cancel(mate)
    assert events[lost].happened == H.CANCELLED and events[lost].step < 1000 and events[lost].x is None
    np.testing.assert_array_equal(events[mate].x, alone(plan(30), 1))


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    gate = threading.Event()
    served = Served((1,), lambda *_: gate.wait(30), active=2, queue=1)
    with served.running():
        ids = [served.submit(plan(4), n) for n in range(3)]
        with pytest.raises(_core.Overloaded, match="1 samples wait already") as caught:
            served.submit(plan(4), 9)
        assert caught.value.retry_s >= 0
        gate.set()
        assert {e.happened for e in served.ends(3).values()} == {H.FINISHED}
        assert served.batcher.stats().refused == 1
        assert served.submit(plan(4), 9) > max(ids)


def test_a_deadline_that_cannot_be_met_is_told_early() -> None:
    served = Served((1,), lambda *_: time.sleep(0.01))
    with served.running():
        served.submit(plan(5), 0)
        served.ends(1)  # so that the cost of a step is known
        hopeless = served.submit(plan(500), 1, deadline_s=0.5)  # needs 5 s
        met = served.submit(plan(3), 2, deadline_s=20.0)
        ends = served.ends(2)
    assert ends[hopeless].happened == H.EXPIRED and ends[hopeless].step < 100
    assert ends[met].happened == H.FINISHED


def test_what_a_shared_call_raises_fails_the_culprit_alone() -> None:
    def before(x: Any, row: Any, c: Any) -> None:
        if (c == 13).any():
            raise ValueError("thirteen")

    served = Served((1, 4), before)
    with served.running():
        ids = {served.submit(plan(6), n, c=float(c)): c for n, c in enumerate((1, 2, 13, 4))}
        ends = served.ends(4)
    for number, c in ids.items():
        if c == 13:
            assert ends[number].happened == H.FAILED and "thirteen" in ends[number].text
        else:
            assert ends[number].happened == H.FINISHED
    nan = Served((1, 2))
    with nan.running():
        bad, good = nan.submit(plan(6), 0, c=float("nan")), nan.submit(plan(6), 1)
        ends = nan.ends(2)
    assert ends[bad].happened == H.FAILED and "not finite" in ends[bad].text
    np.testing.assert_array_equal(ends[good].x, alone(plan(6), 1))


def test_previews_are_the_state_after_their_step_and_a_slow_reader_gets_the_latest() -> None:
    gate = threading.Event()
    served = Served((1,), lambda *_: gate.wait(30))
    with served.running():
        number = served.submit(plan(9), 3, preview_every=2)
        gate.set()
        while served.batcher.stats().finished < 1:
            time.sleep(0.005)
        events = served.batcher.wait(1.0)
    kinds = [event.happened for event in events]
    assert sorted(map(str, kinds)) == sorted(map(str, (H.PROGRESS, H.PREVIEW, H.FINISHED)))
    preview = next(event for event in events if event.happened == H.PREVIEW)
    assert (preview.id, preview.step, preview.steps) == (number, 8, 9) and preview.x.shape == (24,)


def test_draining_finishes_what_was_submitted_and_takes_no_more() -> None:
    served = Served((1, 2))
    thread = threading.Thread(target=served.batcher.run)
    ids = {served.submit(plan(10), n) for n in range(5)}
    thread.start()
    served.batcher.close(drain=True)
    thread.join(60)
    ends = served.ends(5)
    assert ends.keys() == ids and {e.happened for e in ends.values()} == {H.FINISHED}
    assert served.batcher.ended and served.batcher.wait(0.0) == []
    with pytest.raises(ValueError, match="closed"):
        served.submit(plan(2), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"priority": 9}, "priority=9: need -8..8"), ({"deadline_s": 0.0}, "deadline_s=0"),
     ({"guidance": float("inf")}, "need a finite number")],
)  # fmt: skip
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Served().submit(plan(3), 0, **change)


def test_wrong_sizes_are_refused() -> None:
    served = Served()
    p, good = plan(3), [np.zeros(1, np.float32)]
    x, rows = np.zeros(SHAPE, np.float32), rows_of(p)
    for wrong, message in [
        ((7, p, x, rows, good, []), "group=7: no such group"),
        ((0, p, x[:1], rows, good, []), "x has 12 values: need 24"),
        ((0, p, x, rows[:2], good, []), "rows has 4 values: need 3 x 2"),
        ((0, p, x, rows, [], []), "the conditions do not have the group's sizes"),
    ]:
        with pytest.raises(ValueError, match=message):
            served.batcher.submit(*wrong, seed=0, sample=0)
    with pytest.raises(ValueError, match="ascending counts"):
        Served((1, 4, 2))
    with pytest.raises(ValueError, match="active=0"):
        _core.Batcher(active=0)


def test_samples_that_inpaint_share_calls_with_others() -> None:
    """Jumps and merges are the plan's: each sample has the loop's bits, with what is known of it alone."""
    rng, served = np.random.default_rng(0), Served()
    painted = _core.make_repaint(plan(6, "ddpm"), resamples=3, jump_length=2)
    known = [rng.standard_normal(SHAPE, np.float32) for _ in range(2)]
    keep = [(rng.random(SHAPE) < part).astype(np.float32) for part in (0.3, 0.7)]
    with served.running():
        others = {served.submit(plan(9), 5): alone(plan(9), 5)}
        mine = {served.submit(painted, seed, known=known[seed], keep=keep[seed]): seed for seed in (0, 1)}
        ends = served.ends(3)
    for number, seed in mine.items():
        expected = alone(painted, seed, known=known[seed], keep=keep[seed])
        np.testing.assert_array_equal(ends[number].x, expected)
        stays = keep[seed].ravel() == 1
        np.testing.assert_array_equal(expected[stays], known[seed].ravel()[stays])
    for number, expected in others.items():
        np.testing.assert_array_equal(ends[number].x, expected)
    for wrong, message in (
        ({"known": known[0]}, "known has 24 values and keep 0: need 24 each, or none"),
        ({"known": known[0][:1], "keep": keep[0][:1]}, "known has 12 values and keep 12: need 24"),
        ({}, "the plan inpaints; give known and keep"),
    ):
        with pytest.raises(ValueError, match=message):
            Served().submit(painted, 0, **wrong)
