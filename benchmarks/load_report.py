"""A load run's figures, as JSON, a table and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volcast.runtime.atomic import atomic_file

from .load_run import Sent

PERCENTILES = (50, 95, 99)


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99, linear between ranks, and how many there were; None of none."""
    if not values:
        return None
    found = np.percentile(values, PERCENTILES)
    return {
        **{f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)},
        "count": len(values),
    }


def latencies(sent: Sequence[Sent]) -> dict[str, Any]:
    """Seconds from when each was due: to its first step, first preview, volume and refusal."""
    return {
        "first_step_s": percentiles([one.first_step - one.due for one in sent if one.first_step is not None]),
        "first_preview_s": percentiles(
            [one.first_preview - one.due for one in sent if one.first_preview is not None]
        ),
        "volume_s": percentiles([_taken(one) for one in sent if one.outcome == "volume"]),
        "refusal_s": percentiles([_taken(one) for one in sent if one.outcome == "refused"]),
    }


def summary(
    sent: Sequence[Sent], seconds: float, before: Mapping[str, float], after: Mapping[str, float], limit_s: float
) -> dict[str, Any]:  # fmt: skip
    """Of one run of `seconds`: counts, rates, latencies, by steps and priority too, and how full the batches were.

    Good is a request that has its volume within `limit_s` of when it was due, or may still have it when the run ends:
    `late_s`: how late the client itself was, which then is what is measured.
    `goodput_volumes_s` counts the former, `goodput_steps_s` the steps that were taken for both, which a run's ends do
    not blur. `steps_s`: the steps of all.
    """
    outcomes = Counter(one.outcome for one in sent)
    in_time = [one for one in sent if one.outcome == "volume" and _taken(one) <= limit_s]
    open_yet = [one for one in sent if one.outcome == "unfinished" and seconds - one.due <= limit_s]
    change = {name: after[name] - before.get(name, 0) for name in after}
    calls = {int(name.split()[1]): int(n) for name, n in change.items() if name.startswith("volcast_network_calls_total ") and n}  # fmt: skip
    refused = [one for one in sent if one.outcome == "refused"]
    return {
        "seconds": seconds,
        "sent": len(sent),
        "outcomes": dict(outcomes),
        "offered_volumes_s": len(sent) / seconds,
        "offered_steps_s": sum(one.steps for one in sent) / seconds,
        "goodput_volumes_s": len(in_time) / seconds,
        "goodput_steps_s": sum(one.done for one in (*in_time, *open_yet)) / seconds,
        "steps_s": sum(one.done for one in sent) / seconds,
        "refused_with_hint": sum(one.retry_s is not None for one in refused) / len(refused) if refused else None,
        "late_s": percentiles([one.sent - one.due for one in sent]),
        **latencies(sent),
        "by_steps": {str(n): latencies([one for one in sent if one.steps == n]) for n in _values(sent, "steps")},
        "by_priority": {
            str(n): latencies([one for one in sent if one.priority == n]) for n in _values(sent, "priority")
        },
        "calls_by_batch": calls,
        "mean_batch": sum(size * n for size, n in calls.items()) / sum(calls.values()) if calls else None,
    }  # fmt: skip


def table(run: Mapping[str, Any]) -> str:
    """The latencies of a `summary`, a line each."""
    lines = [f"{'seconds to':28}{'p50':>9}{'p95':>9}{'p99':>9}{'count':>8}"]
    rows = [("", run), *((f"{n} steps", one) for n, one in run["by_steps"].items())]
    rows += (
        [(f"priority {n}", one) for n, one in run["by_priority"].items()]
        if len(run["by_priority"]) > 1
        else []
    )
    for who, figures in rows:
        for name in ("first_step_s", "first_preview_s", "volume_s", "refusal_s"):
            if figures[name] is not None:
                values = "".join(f"{figures[name][f'p{p}']:9.3f}" for p in PERCENTILES)
                label = f"{name.removesuffix('_s').replace('_', ' ')} {who and f'({who})'}"
                lines.append(f"{label:28}{values}{figures[name]['count']:8}")
    return "\n".join(lines)


def plot(sent: Sequence[Sent], title: str, path: Path) -> None:
    """A PNG: what became of each request over the time it was due, and how the times to the volume are spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    over, spread = figure.subplots(1, 2)
    colours = ("#1f4e79", "#7fa7c9", "#2a9d8f", "#8d6a9f", "#6b705c")
    for n, colour in zip(_values(sent, "steps"), colours * len(sent), strict=False):
        done = [one for one in sent if one.steps == n and one.outcome == "volume"]
        over.scatter(
            [one.due for one in done], [_taken(one) for one in done], s=14, color=colour, label=f"{n} steps"
        )
        taken = sorted(_taken(one) for one in done)
        if taken:
            spread.step(taken, np.arange(1, len(taken) + 1) / len(taken), color=colour, where="post")
    refused = [one for one in sent if one.outcome == "refused"]
    over.scatter([one.due for one in refused], [_taken(one) for one in refused], s=14, color="#d9822b", marker="x",
                 label="refused")  # fmt: skip
    over.set(xlabel="seconds into the run", ylabel="seconds to the answer", ylim=(0, None))
    spread.set(xlabel="seconds to the volume", ylabel="part of the volumes", xlim=(0, None), ylim=(0, 1))
    for axes in (over, spread):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _taken(one: Sent) -> float:
    assert one.ended is not None
    return one.ended - one.due


def _values(sent: Sequence[Sent], name: str) -> list[int]:
    return sorted({getattr(one, name) for one in sent})
