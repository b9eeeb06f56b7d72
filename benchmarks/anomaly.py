"""What do the bundled model's anomaly maps and likelihoods tell, on crops that it was not trained on?

`python -m volcast.benchmarks.anomaly CROPS.npz HELD_OUT.txt [COUNT [STEPS]]`

First a bright or dark sphere is put into each crop: the area under the ROC curve of telling its voxels from the others by
the map, for each way there and back, and by what the autoencoder alone leaves. Then crops that were altered as a whole:
the AUC, with its interval, of telling them from the crops as they are by the likelihood and by the autoencoder's residual.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volcast.runtime.inversion import Inversion
from volcast.runtime.pipeline import Model, load
from volcast.runtime.roc import roc

from .bench import environment
from .editing import read_crops

Crop = NDArray[np.float32]
Crops = list[tuple[Crop, dict[str, float]]]
THREADS = 1
RADIUS = 4
SPHERES = {"bright sphere": 1.0, "dark sphere": 0.0}
WAYS: tuple[Inversion, ...] = ({"strength": 0.25}, {"strength": 0.5}, {"strength": 0.5, "guidance": 2.0})


def blurred(crop: Crop) -> Crop:
    for axis in range(3):
        padded = np.pad(crop, [(1, 1) if axis == one else (0, 0) for one in range(3)], mode="edge")
        left, middle, right = (np.take(padded, np.arange(crop.shape[axis]) + by, axis) for by in range(3))
        crop = 0.25 * left + 0.5 * middle + 0.25 * right
    return crop


def noisy(crop: Crop) -> Crop:
    return np.clip(crop + np.random.default_rng(1).normal(0, 0.05, crop.shape), 0, 1).astype(np.float32)


ALTERED: dict[str, Callable[[Crop], Crop]] = {
    "uniform noise": lambda crop: np.random.default_rng(0).uniform(0, 1, crop.shape).astype(np.float32),
    "inverted": lambda crop: 1 - crop,
    "turned upside down": lambda crop: np.ascontiguousarray(crop[:, :, ::-1]),
    "shifted by 8 voxels": lambda crop: np.roll(crop, 8, 1),
    "noise of 0.05 added": noisy,
    "blurred (1 2 1)": blurred,
}


def spheres(model: Model, crops: Crops, steps: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    places = []
    for crop, _ in crops:
        centre = [int(rng.integers(RADIUS + 2, size - RADIUS - 2)) for size in crop.shape]
        places.append(np.square(np.moveaxis(np.indices(crop.shape), 0, -1) - centre).sum(-1) <= RADIUS**2)

    def row(maps: list[Crop]) -> dict[str, Any]:
        found = [area(one[place], one[~place]) for one, place in zip(maps, places, strict=True)]
        ratio = [one[place].mean() / one[~place].mean() for one, place in zip(maps, places, strict=True)]
        return {"crops": len(maps), "auc": round(float(np.mean(found)), 3), "auc_least": round(min(found), 3),
                "inside_over_outside": round(float(np.mean(ratio)), 2)}  # fmt: skip

    for name, value in SPHERES.items():
        ill = [
            np.where(place, value, crop).astype(np.float32)
            for (crop, _), place in zip(crops, places, strict=True)
        ]
        residuals = [np.abs(crop - model.decode(model.encode(crop))[0, 0]) for crop in ill]
        yield {"what": name, "way": "autoencoder alone"} | row(residuals)
        for way in WAYS:
            maps = []
            for x, (_, condition) in zip(ill, crops, strict=True):
                how: Inversion = {**way, "condition": condition, "steps": steps}
                maps.append(model.anomaly(x, **how).map.array)
            yield {"what": name, "way": "inversion", "steps": steps, **way} | row(maps)


def area(inside: Crop, outside: Crop) -> float:
    """The AUC of many values: by their ranks (no ties in float32 residuals to speak of)."""
    values = np.concatenate([inside, outside])
    ranks = np.empty(len(values))
    ranks[values.argsort()] = np.arange(1, len(values) + 1)
    wins = ranks[: len(inside)].sum() - len(inside) * (len(inside) + 1) / 2
    return float(wins / (len(inside) * len(outside)))


def altered(model: Model, crops: Crops, steps: int) -> Iterator[dict[str, Any]]:
    scorers: dict[str, Callable[[Crop, dict[str, float]], float]] = {
        "bound": lambda x, condition: float(model.likelihood(x, condition=condition, steps=steps).mean()),
        "autoencoder's residual": lambda x, _: -float(np.abs(x - model.decode(model.encode(x))[0, 0]).mean()),
    }
    for score, scorer in scorers.items():
        known = [scorer(crop, condition) for crop, condition in crops]
        for name, change in ALTERED.items():
            unlike = [scorer(change(crop), condition) for crop, condition in crops]
            found = roc(known, unlike)
            yield {
                "what": name, "score": score, "steps": steps, "crops": len(crops), "auc": round(found.auc, 3),
                "interval": [round(found.low, 3), round(found.high, 3)], "known": round(float(np.mean(known)), 3),
                "unlike": round(float(np.mean(unlike)), 3),
            }  # fmt: skip


def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        sys.exit("usage: python -m volcast.benchmarks.anomaly CROPS.npz HELD_OUT.txt [COUNT [STEPS]]")
    crops, held_out = (Path(one) for one in arguments[:2])
    count, steps = (int(one) for one in [*arguments[2:], "26", "50"][:2])
    given = read_crops(crops, held_out, count)
    model = load(None, "auto", THREADS)
    where = {"model": model.spec.name, "engine": model.engine.name, "environment": environment(THREADS)}
    for rows in (spheres, altered):
        for row in rows(model, given, steps):
            print(json.dumps(row | where), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
