"""The networks' results as the README's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {"step": "step", "decode": "decode", "volume": "50 steps + decode"}
HEAD = (
    "float16, batch 1", "best PyTorch", "volcast", "target, H100", "roofline, H100 (a sample at batch 8)", "TFLOP",
    "GB moved", "of both peaks", "launches", "peak memory (target)",
)  # fmt: skip
UNTIMED = "not yet timed"


def as_markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """One row a part at batch 1, and what a sample takes at batch 8; models that could not be built below the table."""
    rows = [
        f"| {' | '.join(HEAD)} |",
        "|" + "---|" * len(HEAD),
    ]
    rows += [_row(line, lines) for line in lines if line["reason"] is None and line["batch"] == 1]
    rows += [f"\n{line['case']}: {line['reason']}" for line in lines if line["reason"] is not None]
    return "\n".join(rows)


def _row(line: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    size = "x".join(map(str, line["latent"][1:]))
    wide = [
        one for one in lines
        if one["reason"] is None and one["batch"] == 8
        and all(one[key] == line[key] for key in ("case", "part", "latent"))
    ]  # fmt: skip
    roofline = _ms(line["roofline_ms"]) + "".join(f" ({_ms(one['roofline_ms'] / 8)})" for one in wide)
    peers, mine = _times(line, [])
    fraction = line["fraction"]
    cells = [
        f"{line['case']} {NAMES[line['part']]}, latent {size}",
        peers,
        mine + "".join(f" ({time})" for one in wide if (time := _times(one, wide)[1]) != UNTIMED),
        "" if line["reach_ms"] is None else _ms(line["reach_ms"]),
        roofline,
        f"{line['flops'] / 1e12:.3g}",
        f"{line['bytes'] / 1e9:.3g}",
        UNTIMED if fraction is None else f"{fraction['flops']:.0%}, {fraction['bytes']:.0%}",
        "in slabs" if line["slabs"] else str(line["launches"]),
        _memory(line),
    ]
    return f"| {' | '.join(cells)} |"


def _times(line: Mapping[str, Any], wide: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(the best peer's time, volcast's), a sample's where `wide`."""
    if line["timed"] is None:
        return UNTIMED, UNTIMED
    samples = line["batch"] if wide else 1
    medians = {
        one["name"]: one["ms"]["median"] / samples
        for one in line["timed"]["contestants"]
        if one["reason"] is None
    }
    reasons = {one["name"]: one["reason"] for one in line["timed"]["contestants"]}
    others = {name: value for name, value in medians.items() if name != "volcast"}
    best = min(others, key=lambda name: others[name], default=None)
    return (
        "none ran" if best is None else f"{_ms(others[best])} ({best})",
        _ms(medians["volcast"]) if "volcast" in medians else reasons["volcast"],
    )


def _memory(line: Mapping[str, Any]) -> str:
    """Measured, else as planned."""
    found = [
        one["peak_bytes"]
        for one in (line["timed"] or {"contestants": []})["contestants"]
        if one["name"] == "volcast" and one["reason"] is None and one["peak_bytes"] is not None
    ]
    text = _gb(found[0]) if found else f"{_gb(line['peak_bytes'])}, planned"
    return text if line["reach_bytes"] is None else f"{text} ({_gb(line['reach_bytes'])})"


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value >= 1 else f"{value * 1e3:.3g} us"
