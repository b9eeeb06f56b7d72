"""A race's results as a table, a JSON line and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from volcast.runtime.atomic import atomic_file

from .bench import Statistics
from .race import Result

COLUMNS = (
    ("network", "ms a call"),
    ("step", "ms"),
    ("decode", "ms"),
    ("volume", "s (min..max)"),
    ("volumes", "a minute"),
    ("outside", "networks"),
    ("peak", "MiB"),
    ("off MONAI", "rel. L2"),
    ("time over", "volcast's"),
)


def table(results: Sequence[Result], steps: int) -> str:
    """One line a contestant: medians; `step` is the whole loop's time divided by the steps."""
    rows = [("", *(name for name, _ in COLUMNS)), ("", *(unit for _, unit in COLUMNS))]
    notes = []
    for result in results:
        figures = result.figures(steps)
        if not figures:
            notes.append(f"{result.name}: {result.reason}")
            rows.append((result.name, *["-"] * len(COLUMNS)))
            continue
        volume = figures["volume_s"]
        rows.append(
            (
                result.name,
                f"{figures['network_ms'].median:.1f}",
                f"{figures['step_ms'].median:.1f}",
                f"{figures['decode_ms'].median:.0f}",
                f"{volume.median:.2f} ({volume.minimum:.2f}..{volume.maximum:.2f})",
                f"{figures['volumes_per_minute'].median:.1f}",
                f"{figures['outside_percent'].median:.2f} %",
                f"{figures['peak_mib'].maximum:.0f}",
                "-" if result.error is None else f"{result.error:.1e}",
                "-" if result.ratio is None else _ratio(result.ratio),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *notes])


def heading(record: Mapping[str, Any]) -> str:
    """The line above the table: what was measured, and on what."""
    where, settings = record["environment"], record["settings"]
    return (
        f"{record['model']['name']}: one volume, {settings['steps']} DDIM steps, batch 1, {settings['repeats']} rounds; "
        f"{where['cpu']}, {where['threads']} threads, load {where['load']} before"
    )


def record(
    results: Sequence[Result],
    *,
    environment: Mapping[str, Any],
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything for JSON; `settings` must hold `steps`."""
    return {
        "benchmark": "bench",
        "model": dict(model),
        "settings": dict(settings),
        "environment": dict(environment),
        "contestants": [result.as_dict(settings["steps"]) for result in results],
    }


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append one JSON line; a run that is killed leaves the old lines as they were.

    Raises:
        ValueError: the disk is full, or the folder is missing or not writable.
    """
    old = path.read_bytes() if path.exists() else b""
    with atomic_file(path) as temporary:
        temporary.write_bytes(old + json.dumps(line, allow_nan=False).encode() + b"\n")


def plot(results: Sequence[Result], steps: int, title: str, path: Path) -> None:
    """A PNG: a bar for each contestant's volume, split into networks, decode and the rest, its ratio behind it."""
    from matplotlib.figure import Figure

    shown = [result for result in results if result.rounds][::-1]
    parts = [_parts(result, steps) for result in shown]
    totals = [result.figures(steps)["volume_s"] for result in shown]
    figure = Figure(figsize=(9, 1.7 + 0.55 * len(shown)), dpi=150, layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(shown)
    labels = (f"denoising network ({steps} calls)", "decoder", "outside the networks")
    for part, (label, colour) in enumerate(zip(labels, ("#1f4e79", "#7fa7c9", "#d9822b"), strict=True)):
        widths = [each[part] for each in parts]
        axes.barh(
            [result.name for result in shown], widths, left=left, label=label, color=colour, height=0.62
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    low = [max(0.0, end - total.minimum) for end, total in zip(left, totals, strict=True)]
    high = [max(0.0, total.maximum - end) for end, total in zip(left, totals, strict=True)]
    axes.errorbar(left, range(len(shown)), xerr=[low, high], fmt="none", ecolor="black", capsize=3, lw=1)
    for row, (result, end, above, total) in enumerate(zip(shown, left, high, totals, strict=True)):
        text = f"{total.median:.2f} s"
        text += "" if result.ratio is None else f"  ({result.ratio.median:.2f}x)"
        axes.annotate(
            text, (end + above, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_xlim(0, 1.25 * max(total.maximum for total in totals))
    axes.set_xlabel("seconds for one volume, median; whiskers: least and most; (time over volcast's)")
    axes.set_title(title.replace("; ", "\n", 1), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _parts(result: Result, steps: int) -> tuple[float, float, float]:
    """Seconds in the networks, in the decoder and outside; together the median volume, shared out as on average."""
    median = result.figures(steps)["volume_s"].median
    scale = median / sum(round_.total_s for round_ in result.rounds)
    networks = scale * sum(round_.network_s + round_.prepare_s for round_ in result.rounds)
    decode = scale * sum(round_.decode_s for round_ in result.rounds)
    return networks, decode, median - networks - decode


def _ratio(ratio: Statistics) -> str:
    return f"{ratio.median:.2f} ({ratio.minimum:.2f}..{ratio.maximum:.2f})"
