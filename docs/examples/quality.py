"""Samples judged against real images: python docs/examples/quality.py FOLDER [--real IMAGES] [--samples 16] [--steps 10]

Draws samples under conditions of their own, compares them with the images in IMAGES as `volcast evaluate` does, and
writes a picture. Without IMAGES, samples of more steps and other seeds stand for real ones.
"""

import argparse
from pathlib import Path

import numpy as np

import volcast
from volcast.export.evaluation import evaluate
from volcast.export.evaluation_images import read_images
from volcast.export.evaluation_plot import plot

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--real", type=Path)
parser.add_argument("--artifact", type=Path)
parser.add_argument("--samples", type=int, default=16)
parser.add_argument("--steps", type=int, default=10)
given = parser.parse_args()
model = volcast.load(given.artifact)


def draw(folder: Path, first: int, steps: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + given.samples):
        front, back = np.random.default_rng(seed).uniform(0.2, 0.8, 2)
        parts = {"anterior": front, "posterior": back}
        model.sample(seed, condition=parts, steps=steps).save(folder / f"{seed:03}.nii.gz")
    return folder


samples = read_images(draw(given.folder / "few", 0, given.steps))
real = read_images(given.real or draw(given.folder / "many", given.samples, 5 * given.steps))
print((found := evaluate(samples, real)).as_text())
plot(found, samples, real, given.folder / "quality.png")
