"""What a service counts, and what the docs say of it."""

from __future__ import annotations

import re
from pathlib import Path

from volcast.runtime.metrics import METRICS, OUTCOMES, Tally

DOCS = Path(__file__).parent.parent / "docs"


def test_the_docs_list_every_metric() -> None:
    rows = re.findall(
        r"^\| `(volcast_\w+)` \| (.*) \| (.*) \|$", (DOCS / "serving.md").read_text(), re.MULTILINE
    )
    kinds = [one.kind + (f", by {one.label}" if one.label else "") for one in METRICS]
    assert rows == [(one.name, kind, one.text) for one, kind in zip(METRICS, kinds, strict=True)]


def test_a_request_is_open_until_it_has_ended() -> None:
    tally = Tally()
    tally.began()
    tally.began()
    tally.refused("invalid")
    tally.ended("done")
    totals = tally.totals(None)
    assert totals["volcast_open_requests", ""] == 1
    assert {key[1]: value for key, value in totals.items() if key[0] == "volcast_requests_total"} == {
        "invalid": 1, "done": 1,
    }  # fmt: skip
    assert {"invalid", "done"} <= set(OUTCOMES)
    assert {name for name, _ in totals} <= {one.name for one in METRICS}


def test_seconds_are_taken_once() -> None:
    tally = Tally()
    tally.made({"steps": 1.5, "decode": 0.5})
    assert tally.take_seconds() == [("steps", 1.5), ("decode", 0.5)] and tally.take_seconds() == []
    assert tally.totals(None)["volcast_volumes_total", ""] == 1
    assert tally.totals(None)["volcast_last_volume_timestamp_seconds", ""] > 1.7e9
