"""What `verify` found: checks against budgets, and the budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, final

from volcast.runtime.spec import Precision

STEP = 1e-4
"""Float32 sums in another order: 2^-24 sqrt(5184 terms) sqrt(60 layers) = 3.3e-5 of a network's output, times 3."""

VOLUME = 1e-3
"""DDIM turns x by pi/2 in all (arXiv:2202.00512, Eq. 8: x' = cos x - sin v): STEP pi/2, times 6 for the network's own
growth of an error."""

MS_SSIM, MS_SSIM_INT8 = 0.99, 0.97
"""Stored weights make another network within rounding; of its volume we ask that it looks the same. An int8 network is
rounded at every layer of every step."""

ROUNDING = {Precision.FP32: 0.0, Precision.FP16: 2.0**-11, Precision.BF16: 2.0**-8}
"""Largest relative error of a stored weight: eps / 2."""


def network_budget(precision: Precision | Literal["int8"], weights: int) -> float | None:
    """The largest relative L2 error of a network's output with `weights` stored tensors of two or more axes.

    None for int8: there the volumes are judged, since what one call loses says little about them. Rounding changes the
    output of each of the L layers by eps/2 of it at most, and the layers' errors are independent, so they add in
    quadrature: eps/2 sqrt(L), beside what float32 itself gets (STEP).
    """
    return None if precision == "int8" else STEP + ROUNDING[precision] * math.sqrt(weights)


def ms_ssim_budget(precision: str) -> float:
    """The smallest MS-SSIM of a volume of an artifact of this precision."""
    return MS_SSIM_INT8 if precision == "int8" else MS_SSIM


@final
@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison. It passes if `value <= budget` (`at_least`: `>=`); without a budget if it is no NaN."""

    name: str
    value: float
    budget: float | None
    at_least: bool = False
    note: str = ""

    @property
    def passed(self) -> bool:
        if self.budget is None:
            return not math.isnan(self.value)
        return self.value >= self.budget if self.at_least else self.value <= self.budget

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `value` is null where it is infinite or no number."""
        return {
            "name": self.name,
            "value": self.value if math.isfinite(self.value) else None,
            "budget": self.budget,
            "at_least": self.at_least,
            "passed": self.passed,
            "note": self.note,
        }


@final
@dataclass(frozen=True, kw_only=True)
class Verification:
    """An artifact compared with MONAI running its bundle; `subject` says what was compared, in words."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Every check is within its budget."""
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """`passed`, or the checks that failed."""
        failed = [
            check.name + (f" ({check.note})" if check.note else "")
            for check in self.checks
            if not check.passed
        ]
        return "passed" if not failed else f"FAILED: {', '.join(failed)}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "subject": self.subject,
            "passed": self.passed,
            "verdict": self.verdict,
            "checks": [check.as_dict() for check in self.checks],
        }

    def as_text(self) -> str:
        """A table, one check a line, and the verdict."""
        width = max(len(check.name) for check in self.checks)
        lines = [self.subject, f"{'check':<{width}} {'value':>10} {'budget':>12}"]
        for check in self.checks:
            sign = ">=" if check.at_least else "<="
            budget = "" if check.budget is None else f"{sign} {check.budget:.3g}"
            outcome = "FAIL" if not check.passed else "" if check.budget is None else "ok"
            lines.append(f"{check.name:<{width}} {check.value:>10.4g} {budget:>12}  {outcome}".rstrip())
        return "\n".join([*lines, self.verdict])
