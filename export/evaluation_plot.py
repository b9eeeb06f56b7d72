"""A picture of an evaluation: grey values, distances to the nearest real image, and how alike two images are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from volcast.runtime.atomic import atomic_file
from volcast.runtime.picture import check_png_path

from .evaluation import Evaluation
from .evaluation_flags import COPY
from .evaluation_images import ImageSet

_COLOURS = {"samples": "#d9822b", "real": "#1f4e79"}
_BINS = 30
_VOXELS = 1_000_000
"""Of each side, evenly spaced, for the histogram of grey values."""


def plot(found: Evaluation, samples: ImageSet, real: ImageSet, path: Path) -> None:
    """Write the PNG `path` (ValueError: another suffix, an unwritable folder, a full disk)."""
    from matplotlib.figure import Figure

    check_png_path(path)
    figure = Figure(figsize=(10, 3.2), dpi=80, layout="constrained")
    grey, distance, alike = figure.subplots(1, 3)
    flats = {name: each.images.reshape(-1) for name, each in (("samples", samples), ("real", real))}
    _histogram(grey, {name: each[:: max(1, each.size // _VOXELS)] for name, each in flats.items()})
    grey.set_title("grey values", fontsize=9, loc="left")
    spread = found.spread
    _histogram(distance, {"samples": spread.to_real, "real": spread.among_real})
    distance.axvline(COPY * float(np.median(spread.among_real)), color="black", lw=1, ls=":")
    distance.set_title("root mean square difference to the nearest\nreal image; left of the line: a copy", fontsize=9, loc="left")  # fmt: skip
    _histogram(alike, {"samples": spread.alike_samples, "real": spread.alike_real})
    alike.set_title("MS-SSIM of two samples, of two real images", fontsize=9, loc="left")
    grey.legend(frameon=False, fontsize=8)
    for axes in (grey, distance, alike):
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _histogram(axes: Any, values: dict[str, Any]) -> None:
    low = min(float(each.min()) for each in values.values())
    high = max(float(each.max()) for each in values.values())
    bins = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    for name, each in values.items():
        weights = np.full(len(each), 1 / len(each))
        axes.hist(each, bins, weights=weights, color=_COLOURS[name], alpha=0.55, label=f"{name}")
