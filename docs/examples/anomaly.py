"""What a model finds unlike its training data: python docs/examples/anomaly.py FOLDER [--steps 20]

A sample stands for a scan, with a bright sphere put into it. It is taken to noise by DDIM backwards and back; the difference
is the map. The likelihoods of both are told, and one picture is written.
"""

import argparse
from pathlib import Path

import numpy as np

import volcast
from volcast.runtime.picture import mosaic, save_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    model = volcast.load()
    condition = {"anterior": 0.4, "posterior": 0.4}
    scan = model.sample(seed=2, steps=given.steps, condition=condition)
    grid = np.moveaxis(np.indices(scan.array.shape), 0, -1)
    sphere = np.square(grid - [16, 20, 15]).sum(-1) <= 16
    ill = volcast.Volume(np.where(sphere, 1, scan.array).astype(np.float32), scan.affine, scan.spacing_mm)
    found = model.anomaly(ill, condition=condition, steps=given.steps, strength=0.5)
    found.map.save(given.folder / "anomaly.nii.gz")
    inside, outside = (found.map.array[part].mean() for part in (sphere, ~sphere))
    print(f"|x - x_hat|: {inside:.3f} in the sphere, {outside:.3f} elsewhere")
    for name, volume in (("as it was", scan), ("with the sphere", ill)):
        log_p = model.likelihood(volume, condition=condition, steps=given.steps)
        print(f"{name}: {-log_p.mean():.2f} nats a value")
    shown = mosaic([ill, found.reconstruction, found.map], ["with a sphere", "there and back", "the map"])
    save_picture(shown, given.folder / "anomaly.png")


if __name__ == "__main__":
    main()
