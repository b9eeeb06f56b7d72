"""A label map made in code, and volumes of it: python docs/examples/label_map.py FOLDER [--steps 50]

Two ellipsoids stand for the anterior and the posterior hippocampus; the bundled model's ControlNet paints the scan
around them, at three strengths. Writes the label map and the volumes as NIfTI and one picture of their middle planes.
"""

import argparse
from pathlib import Path

import numpy as np

import volcast
from volcast.runtime.default_artifact import default_artifact
from volcast.runtime.picture import mosaic, save_picture
from volcast.runtime.volume import centred_affine

SHAPE = (32, 48, 32)  # left to right, back to front, down to up, in millimetres


def ellipsoid(centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    """Where sum ((i - centre) / radii)^2 <= 1."""
    grid = np.moveaxis(np.indices(SHAPE), 0, -1)
    return (((grid - centre) / radii) ** 2).sum(-1) <= 1


def label_map() -> np.ndarray:
    """0 background, 1 anterior, 2 posterior."""
    labels = np.zeros(SHAPE, np.int64)
    labels[ellipsoid((16, 16, 18), (6, 12, 6))] = 2
    labels[ellipsoid((16, 32, 14), (8, 9, 7))] = 1
    return labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)

    # A Volume as a condition lends the samples its place; a plain array does as well.
    affine, spacing = centred_affine(SHAPE, (1.0, 1.0, 1.0)), (1.0, 1.0, 1.0)
    mask = volcast.Volume(label_map().astype(np.float32), affine, spacing)
    mask.save(given.folder / "label.nii.gz")
    shown, captions = [mask], ["label map"]
    with volcast.load(default_artifact(controlled=True)) as model:
        for strength in (0.0, 0.5, 1.0):
            condition = {"mask": mask, "mask_scale": strength, "anterior": 0.5, "posterior": 0.5}
            volume = model.sample(seed=1, steps=given.steps, condition=condition)
            volume.save(given.folder / f"strength_{strength:g}.nii.gz")
            shown.append(volume)
            captions.append(f"mask_scale {strength:g}")
    save_picture(mosaic(shown, captions), given.folder / "label_map.png")


if __name__ == "__main__":
    main()
