"""A part of a volume painted anew: python docs/examples/inpaint.py FOLDER [--steps 25]

A sample stands for a scan. A cube of it is blanked and painted with five seeds (RePaint); their mean and standard deviation
are written as NIfTI, and one picture of all.
"""

import argparse
from pathlib import Path

import numpy as np

import volcast
from volcast.runtime.picture import mosaic, save_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)

    model = volcast.load()
    scan = model.sample(seed=1, steps=given.steps)
    mask = np.zeros(scan.array.shape, np.float32)
    mask[8:24, 16:32, 8:24] = 1
    # What is hidden must not reach the encoder, which sees some voxels around each that it codes.
    blank = volcast.Volume(
        np.where(mask, scan.array[mask == 0].mean(), scan.array), scan.affine, scan.spacing_mm
    )
    how = {"image": blank, "inpaint": volcast.Inpaint(mask), "scheduler": "ddpm", "steps": given.steps}
    ensemble = volcast.Ensemble()
    for painted in model.sample_many(5, seed=0, **how):
        ensemble.add(painted)
    mean, std = ensemble.mean(), np.sqrt(ensemble.variance().array)
    mean.save(given.folder / "mean.nii.gz")
    volcast.Volume(std, scan.affine, scan.spacing_mm).save(given.folder / "std.nii.gz")
    save_picture(
        mosaic([scan, blank, painted, mean], ["volume", "hidden", "painted", "mean of 5"]),
        given.folder / "inpaint.png",
    )


if __name__ == "__main__":
    main()
