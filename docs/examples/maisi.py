"""A CT volume of MAISI: python docs/examples/maisi.py BUNDLE FOLDER [--mask LABELS.nii.gz] [--steps 30] [--size 64 64 64]

BUNDLE is the zoo's maisi_ct_generative with its weights. It is exported, with its ControlNet where a label map is given, and
samples one volume by rectified flow, written as NIfTI in Hounsfield units. --size is the latent's, a quarter of the volume's.
"""

import argparse
from pathlib import Path

import numpy as np

import volcast
from volcast.export.artifact import export_bundle
from volcast.export.bundle import read_bundle
from volcast.runtime.volume import read_nifti

CT = 1
"""The class of MAISI's network."""
AIR = -1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, nargs=3)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    labels = None if given.mask is None else read_nifti(given.mask)
    bundle = read_bundle(given.bundle, controlnets=[] if labels is None else ["controlnet_def"])
    export_bundle(bundle, given.folder / "artifact", batch=(1, 1), replace=True)

    condition = {"class_labels": CT} if labels is None else {"class_labels": CT, "mask": labels}
    model = volcast.load(given.folder / "artifact")
    volume = model.sample(seed=0, steps=given.steps, size=given.size, condition=condition)
    if labels is not None:  # as MAISI's script does at last
        volume.array[labels.array == 0] = AIR
    volume.save(given.folder / "ct.nii.gz")
    low, middle, high = np.percentile(volume.array, (0, 50, 100))
    spacing = " x ".join(f"{size:g}" for size in volume.spacing_mm)
    print(f"{volume.array.shape}, {spacing} mm, {low:.0f}..{high:.0f} HU, median {middle:.0f}")


if __name__ == "__main__":
    main()
