"""export/verification: what passes, and how it is told."""

import json
import math

import pytest

from volcast.export.verification import STEP, Check, Verification, network_budget
from volcast.runtime.spec import Precision


@pytest.mark.parametrize(
    ("value", "budget", "at_least", "passed"),
    [
        (1.0, 1.0, False, True),
        (1.1, 1.0, False, False),
        (1.1, 1.0, True, True),
        (0.9, 1.0, True, False),
        (math.inf, 1.0, False, False),
        (math.inf, None, False, True),
        (math.nan, 1.0, False, False),
        (math.nan, 1.0, True, False),
        (math.nan, None, False, False),
    ],
)
def test_a_check(value: float, budget: float | None, at_least: bool, passed: bool) -> None:
    assert Check(name="a", value=value, budget=budget, at_least=at_least).passed is passed


def test_budgets_grow_with_the_rounding_of_the_weights() -> None:
    assert network_budget(Precision.FP32, 100) == STEP
    assert network_budget(Precision.FP16, 100) == pytest.approx(STEP + 10 * 2.0**-11)
    assert network_budget(Precision.BF16, 100) == pytest.approx(STEP + 10 * 2.0**-8)


def test_one_failed_check_fails_all_and_is_named() -> None:
    good = Check(name="decode", value=0.5, budget=1)
    bad = Check(name="volume", value=math.nan, budget=1, note="x is not finite")
    assert Verification(subject="s", checks=(good,)).verdict == "passed"
    found = Verification(subject="s", checks=(good, bad))
    assert not found.passed and found.verdict == "FAILED: volume (x is not finite)"
    lines = found.as_text().splitlines()
    assert lines[0] == "s" and lines[2].endswith("ok") and lines[3].endswith("FAIL")
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert data["passed"] is False and [check["value"] for check in data["checks"]] == [0.5, None]
