"""How near do samples of the trained upscaler come to crops that it was not trained on, and how sharp are they?

`python -m volcast.benchmarks.upscaler CROPS.npz HELD_OUT.txt [COUNT [STEPS [LEVEL]]]`

Each crop's means over 2 x 2 x 2 voxels are enlarged by repetition, by linear interpolation, and by the upscaler with four
seeds. One line each: PSNR and SSIM against the crop, and sharpness (the root of the neighbours' mean squared differences,
summed over the axes) over that of the crop.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from volcast.export.artifact import export_bundle
from volcast.export.bundle import read_bundle
from volcast.export.similarity import ssim
from volcast.runtime.default_artifact import BUNDLE
from volcast.runtime.pipeline import load

from .bench import environment
from .editing import read_crops

Image = NDArray[np.floating]
UPSCALER = BUNDLE.parent / "upscaler"
SEEDS = 4
THREADS = 1


def coarsened(x: Image) -> Image:
    """Means over 2 x 2 x 2 voxels."""
    return np.asarray(x.reshape([part for size in x.shape for part in (size // 2, 2)]).mean((1, 3, 5)))


def enlarged(x: Image) -> NDArray[np.float32]:
    """Twice the size along each axis by linear interpolation: 3/4 of a new voxel is its own old one, 1/4 the next."""
    for axis in range(x.ndim):
        x = np.moveaxis(x, axis, 0)
        below, above = np.concatenate((x[:1], x[:-1])), np.concatenate((x[1:], x[-1:]))
        both = np.stack((0.75 * x + 0.25 * below, 0.75 * x + 0.25 * above), 1)
        x = np.moveaxis(both.reshape(-1, *x.shape[1:]), 0, axis)
    return x.astype(np.float32)


def psnr(x: Image, wanted: Image) -> float:
    """In dB, for intensities of 0..1."""
    return -10 * float(np.log10(np.square(x - wanted).mean()))


def sharpness(x: Image) -> float:
    """The root of the mean squared difference of neighbours, summed over the axes."""
    return float(np.sqrt(sum(np.square(np.diff(x, axis=axis)).mean() for axis in range(x.ndim))))


def judged(x: Image, crop: Image) -> list[float]:
    pair = x[None, None].astype(np.float32), crop[None, None]
    return [psnr(x, crop), ssim(*pair, peak=1), sharpness(x) / sharpness(crop)]


def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        sys.exit(
            "usage: python -m volcast.benchmarks.upscaler CROPS.npz HELD_OUT.txt [COUNT [STEPS [LEVEL]]]"
        )
    count, steps, level = (int(one) for one in [*arguments[2:], *("26", "10", "0")[len(arguments) - 2 :]])
    crops = [crop for crop, _ in read_crops(Path(arguments[0]), Path(arguments[1]), count)]
    found: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(read_bundle(UPSCALER), Path(folder) / "artifact", batch=(1, 1))
        model = load(Path(folder) / "artifact", "auto", THREADS)
        for number, crop in enumerate(crops):
            coarse = coarsened(crop)
            condition = {"low_res": enlarged(coarse), "noise_level": level}
            given = {"seed": number, "steps": steps, "condition": condition}
            samples = [one.array for one in model.sample_many(SEEDS, **given)]  # type: ignore[arg-type]
            ways = {
                "repeated": np.kron(coarse, np.ones((2, 2, 2))),
                "interpolated": condition["low_res"],
                "a sample": samples[0],
                f"the mean of {SEEDS}": np.mean(samples, 0),
            }
            for way, image in ways.items():
                found.setdefault(way, []).append(judged(np.asarray(image), crop))
    where = {"crops": len(crops), "steps": steps, "noise_level": level, "engine": model.engine.name}
    for way, rows in found.items():
        names = zip(("psnr", "ssim", "sharpness"), np.mean(rows, 0), strict=True)
        measured = {name: round(float(value), 3) for name, value in names}
        print(json.dumps({"upscaler": way} | measured | where | {"environment": environment(THREADS)}))


if __name__ == "__main__":
    main(sys.argv[1:])
