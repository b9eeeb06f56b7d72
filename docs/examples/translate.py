"""A scan made into another, more and less: python docs/examples/translate.py FOLDER [--steps 40]

A sample with small parts of the hippocampus stands for a scan. It is noised part of the way and denoised as one with large
parts (SDEdit), at three strengths with five seeds each. Told is how much of the scan is left and how far the seeds differ;
the mean and the variance of the strongest are written as NIfTI, and one picture.
"""

import argparse
from pathlib import Path

import numpy as np

import volcast
from volcast.runtime.picture import mosaic, save_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    model = volcast.load()
    scan = model.sample(seed=1, steps=given.steps, condition={"anterior": 0.1, "posterior": 0.1})
    large = {"anterior": 0.9, "posterior": 0.9}
    shown, captions = [scan], ["small parts"]
    for strength in (0.25, 0.5, 0.75):
        ensemble = volcast.Ensemble()
        how = {"image": scan, "strength": strength, "steps": given.steps, "guidance": 2.0}
        for volume in model.sample_many(5, seed=2, condition=large, **how):
            ensemble.add(volume)
        left = np.corrcoef(scan.array.ravel(), ensemble.mean().array.ravel())[0, 1]
        spread = np.sqrt(ensemble.variance().array)
        print(f"strength {strength}: correlation {left:.3f} with the scan, deviation {spread.mean():.3f}")
        shown.append(volume)
        captions.append(f"strength {strength}")
    ensemble.mean().save(given.folder / "mean.nii.gz")
    ensemble.variance().save(given.folder / "variance.nii.gz")
    shown.append(volcast.Volume(spread, scan.affine, scan.spacing_mm))
    save_picture(
        mosaic(shown, [*captions, "deviation of the last"], scale=1.5), given.folder / "strength.png"
    )


if __name__ == "__main__":
    main()
