"""Timing that every benchmark shares: statistics of repeated runs, and the environment that a result belongs to."""

from __future__ import annotations

import datetime
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

import numpy as np

import volcast
from volcast.runtime.engine_auto import physical_cores

PACKAGES = ("volcast", "numpy", "torch", "triton", "monai", "onnx", "onnxruntime", "openvino")


@final
@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of repeated measurements, in their unit. `p90` is interpolated linearly between ranks."""

    median: float
    minimum: float
    maximum: float
    p90: float
    count: int

    def as_dict(self) -> dict[str, float | int]:
        """Every field, for JSON."""
        return asdict(self)


def summarize(values: Sequence[float]) -> Statistics:
    """Statistics of one or more finite numbers (ValueError otherwise)."""
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"[bench] values={list(values)}: need one or more finite numbers")
    median, p90 = np.percentile(values, [50, 90])
    return Statistics(
        median=float(median), minimum=min(values), maximum=max(values), p90=float(p90), count=len(values)
    )


def paired_ratios(above: Sequence[float], below: Sequence[float]) -> Statistics:
    """Of above[i] / below[i]: rounds run side by side, so that a slow moment of the machine cancels.

    Raises:
        ValueError: not as many on one side as on the other, none, or a number that is not above 0.
    """
    if len(above) != len(below) or not all(value > 0 for value in (*above, *below)):
        raise ValueError(f"[bench] ratios of {list(above)} to {list(below)}: need pairs of numbers above 0")
    return summarize([a / b for a, b in zip(above, below, strict=True)])


def measure(functions: Sequence[Callable[[], object]], warmup: int, repeats: int) -> list[tuple[float, ...]]:
    """Seconds of wall time of `repeats` calls of every function, taken in turns; `warmup` calls each go first.

    Raises:
        ValueError: `warmup` below 0 or `repeats` below 1.
    """
    if warmup < 0 or repeats < 1:
        raise ValueError(f"[bench] warmup={warmup}, repeats={repeats}: need at least 0 and 1")
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(warmup + repeats):
        for function, taken in zip(functions, seconds, strict=True):
            began = time.perf_counter()
            function()
            if turn >= warmup:
                taken.append(time.perf_counter() - began)
    return [tuple(taken) for taken in seconds]


def environment(threads: int) -> dict[str, Any]:
    """What a result depends on: processor, threads, versions, commit, date (UTC), how busy the machine was.

    Nothing that names the machine, its user or its folders.
    """
    return {
        "cpu": cpu_model(),
        "cores": physical_cores(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The processor's name as Linux gives it, else the architecture's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return volcast.__version__ if name == "volcast" else None


def _commit() -> str | None:
    """The checkout's commit, `+` behind it if files differ; None outside a checkout of volcast."""
    package = Path(volcast.__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=package, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    # A volcast installed inside somebody else's repository has no commit of its own.
    if top is None or Path(top).resolve() / "src" / "volcast" != package:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{git('rev-parse', '--short=12', 'HEAD')}{'+' if changed else ''}"
