"""A volume made coarse and brought back: python docs/examples/upscale.py UPSCALER FOLDER [--steps 10] [--level 0]

UPSCALER is what `volcast export src/volcast/models/upscaler -o UPSCALER` wrote. A sample of the bundled model stands for a
scan. Its means over 2 x 2 x 2 voxels are enlarged by interpolation alone, and by the upscaler with five seeds. Told is how
near each comes (PSNR), and how sharp it is; one picture of all.
"""

import argparse
from pathlib import Path

import volcast
from volcast.benchmarks.upscaler import coarsened, enlarged, psnr, sharpness
from volcast.runtime.picture import mosaic, save_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("upscaler", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--level", type=int, default=0, help="How far the image is noised before: 0..11.")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    scan = volcast.load().sample(seed=2, steps=25)
    linear = volcast.Volume(enlarged(coarsened(scan.array)), scan.affine, scan.spacing_mm)
    condition = {"low_res": linear, "noise_level": given.level}
    samples = volcast.Ensemble()
    for fine in volcast.load(given.upscaler).sample_many(5, steps=given.steps, condition=condition):
        samples.add(fine)
    shown = {"volume": scan, "interpolated": linear, "upscaled": fine, "mean of 5": samples.mean()}
    for name, volume in shown.items():
        apart = "" if volume is scan else f"PSNR {psnr(volume.array, scan.array):.2f} dB, "
        print(f"{name}: {apart}sharpness {sharpness(volume.array) / sharpness(scan.array):.3f}")
    fine.save(given.folder / "fine.nii.gz")
    save_picture(mosaic(list(shown.values()), list(shown), scale=2), given.folder / "upscale.png")


if __name__ == "__main__":
    main()
