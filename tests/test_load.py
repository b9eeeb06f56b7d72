"""The load generator: what it counts, by hand and on the real server. Nothing asserts on speed."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import Served

from volcast.benchmarks import load_report
from volcast.benchmarks.load import as_text, ratios, run_phase
from volcast.benchmarks.load_run import Load, Mix, Sent
from volcast.benchmarks.server import Server
from volcast.runtime.client_async import AsyncClient


def sent() -> list[Sent]:
    """In a run of ten seconds: two volumes in time, one late, one not done that may still be in time, one that may not."""
    return [
        Sent(steps=5, priority=0, due=0.0, sent=0.0, done=5, first_step=0.5, first_preview=0.75, ended=1.0, outcome="volume"),
        Sent(steps=10, priority=2, due=1.0, sent=1.5, done=10, first_step=2.0, ended=4.0, outcome="volume"),
        Sent(steps=10, priority=0, due=1.0, sent=1.0, done=10, first_step=5.0, ended=9.0, outcome="volume"),
        Sent(steps=10, priority=0, due=9.0, sent=9.0, done=2, first_step=9.5),
        Sent(steps=10, priority=0, due=2.0, sent=2.0, done=7, first_step=9.5),
        Sent(steps=5, priority=0, due=8.0, sent=8.0, ended=8.125, outcome="refused", retry_s=1.0),
        Sent(steps=5, priority=0, due=8.0, sent=8.0, ended=8.375, outcome="refused"),
    ]  # fmt: skip


def found() -> dict[str, Any]:
    before = {"volcast_network_calls_total 1": 2.0, "volcast_steps_total": 1.0}
    after = {
        "volcast_network_calls_total 1": 6.0,
        "volcast_network_calls_total 4": 10.0,
        "volcast_steps_total": 45.0,
    }
    return load_report.summary(sent(), 10.0, before, after, 5.0)


def test_a_summary_counts_what_is_in_time() -> None:
    run = found()
    assert run["outcomes"] == {"volume": 3, "unfinished": 2, "refused": 2} and run["refused_with_hint"] == 0.5
    assert (run["goodput_volumes_s"], run["goodput_steps_s"], run["steps_s"]) == (0.2, 1.7, 3.4)
    assert (run["offered_volumes_s"], run["offered_steps_s"]) == (0.7, 5.5)
    assert run["calls_by_batch"] == {1: 4, 4: 10} and run["mean_batch"] == 44 / 14
    # From when a request was due, also where the client itself was late.
    assert run["volume_s"] == {"p50": 3.0, "p95": pytest.approx(7.5), "p99": pytest.approx(7.9), "count": 3}
    assert (
        run["by_priority"]["2"]["first_step_s"]["p50"] == 1.0
        and run["by_steps"]["5"]["volume_s"]["count"] == 1
    )
    assert run["first_preview_s"]["count"] == 1 and run["late_s"]["p99"] > 0
    assert run["refusal_s"]["p50"] == 0.25
    json.dumps(run, allow_nan=False)


def test_rounds_are_paired() -> None:
    rounds = [
        {"alone": {"steps_s": a}, "together": {"steps_s": b}, "open": {"goodput_steps_s": c}}
        for a, b, c in [(1.0, 2.0, 1.0), (2.0, 3.0, 3.0), (1.0, 4.0, 3.0)]
    ]
    both = ratios(rounds)
    assert both["together_over_alone"]["median"] == 2.0 and both["goodput_over_capacity"]["median"] == 0.75


def test_the_report_is_a_table_and_a_picture(tmp_path: Path) -> None:
    run = {"load": 1.0, **found()}
    line = {"artifact": "a", "engine": "e", "environment": {"threads": 1}, "settings": {"overload": 2.0},
            "ratios": {name: {"median": 1.0, "minimum": 1.0, "maximum": 1.0}
                       for name in ("together_over_alone", "goodput_over_capacity")},
            "rounds": [{"alone": run, "together": run, "open": run}]}  # fmt: skip
    text = as_text(line)
    assert "volume (5 steps)" in text and "(priority 2)" in text and "refusal" in text
    load_report.plot(sent(), "a title", tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"


def test_requests_reach_the_server_and_are_accounted_for(served: Served) -> None:
    server = Server(grpc=f"127.0.0.1:{served.grpc}", metrics=f"http://127.0.0.1:{served.metrics}/metrics")
    mix = Mix(steps=(3, 40), priorities=(0, 2), guidance=2.0, preview_every=10)
    for phase in ("alone", "together", "open"):
        served.ready()  # callers who leave may end Triton 24.10
        run, requests = asyncio.run(
            run_phase(server, mix, phase, callers=4, rate=20.0, seconds=1.0, limit_s=60.0, rng=np.random.default_rng(3))
        )  # fmt: skip
        assert sum(run["outcomes"].values()) == run["sent"] == len(requests)
        assert set(run["outcomes"]) <= {"volume", "unfinished"} and {one.steps for one in requests} <= {3, 40}
        for one in requests:
            assert one.done <= one.steps
            if one.outcome == "volume":
                assert one.done == one.steps and one.first_step is not None and one.ended is not None
                assert one.due <= one.sent <= one.first_step <= one.ended


def test_arrivals_are_poisson() -> None:
    async def due(seed: int) -> list[float]:
        async with AsyncClient("127.0.0.1:1", tries=1) as nobody:
            load = Load(nobody, Mix(steps=(5,)), np.random.default_rng(seed))
            await load.open_loop(400.0, 0.5)
        assert all(one.outcome in ("refused", "unfinished") for one in load.sent)
        return [one.due for one in load.sent]

    arrivals = [asyncio.run(due(seed)) for seed in range(4)]
    assert arrivals[0] == asyncio.run(due(0)) != arrivals[1]
    assert all(one == sorted(one) and 0 <= one[0] and one[-1] < 0.5 for one in arrivals)
    # 4 times 200 on average: six standard deviations. Gaps between them are exponential, whose deviation is their mean.
    total = sum(len(one) for one in arrivals)
    assert abs(total - 800) < 6 * math.sqrt(800)
    gaps = np.concatenate([np.diff(one) for one in arrivals])
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=6 / math.sqrt(total))
