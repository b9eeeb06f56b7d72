"""The kernels' results as the README's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def as_markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """One row a case; times in milliseconds, rounded to three digits."""
    rows = [
        "| operation (float16, batch 1) | best PyTorch | volcast | target, H100 | roofline, H100 | registers | spills |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        times = line["timed"]
        if times is None:
            peer = mine = "not yet timed"
        else:
            # A copy is no peer: it is what the memory allows.
            others = {
                name: one["median"]
                for name, one in times["ms"].items()
                if name != "volcast" and "copy_" not in name
            }
            best = min(others, key=lambda name: others[name])
            peer, mine = f"{_ms(others[best])} ({best})", _ms(times["ms"]["volcast"]["median"])
        registers = [one["registers"] for one in line["resources"]]
        spills = sum(one["spill_bytes"] > 0 for one in line["resources"])
        spread = f"{min(registers)}..{max(registers)}" if registers else ""
        reach = "" if line["reach_ms"] is None else _ms(line["reach_ms"])
        rows.append(
            f"| {line['case']} | {peer} | {mine} | {reach} | {_ms(line['roofline_ms'])} | {spread} | {spills or 'none'} |"
        )
    return "\n".join(rows)


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value >= 1 else f"{value * 1e3:.3g} us"
