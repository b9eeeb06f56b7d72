"""Images of a label map in one pass: python docs/examples/one_pass.py BUNDLE FOLDER

BUNDLE holds a SPADENet for 2D images with three labels (docs/zoo.md says what its config looks like). It is exported,
makes three images of one label map from three draws of noise, and one of the label map turned around in the style of the
first image. Writes the images as NIfTI and one picture.
"""

import argparse
from pathlib import Path

import numpy as np

import volcast
from volcast.export.generator_artifact import export_generator
from volcast.export.generator_bundle import read_generator
from volcast.runtime.picture import picture, save_picture


def label_map(shape: tuple[int, ...]) -> np.ndarray:
    """0 background, 1 an ellipse in front, 2 one behind it."""
    i, j = (grid / size - 0.5 for grid, size in zip(np.indices(shape), shape, strict=True))
    behind = (i / 0.15) ** 2 + ((j + 0.17) / 0.22) ** 2 <= 1
    front = ((i - 0.03) / 0.2) ** 2 + ((j - 0.17) / 0.16) ** 2 <= 1
    return np.where(front, 1, np.where(behind, 2, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    spec = export_generator(read_generator(given.bundle), given.folder / "artifact", replace=True)
    model = volcast.load(given.folder / "artifact")
    mask = label_map(spec.image_shape[1:])
    images = list(model.sample_many(3, seed=1, batch=3, condition={"mask": mask}))
    images.append(model.sample(seed=1, condition={"mask": mask[:, ::-1]}, image=images[0]))
    for number, image in enumerate(images):
        image.save(given.folder / f"image_{number}.nii.gz")
    # Side by side, from the left: an axis to the patient's right runs to the left in pictures.
    row = np.concatenate([mask / 2, *(image.array for image in images)][::-1]).astype(np.float32)
    save_picture(picture(volcast.Volume(row, np.eye(4), images[0].spacing_mm)), given.folder / "one_pass.png")


if __name__ == "__main__":
    main()
