"""One seed with reused features, beside the whole run: python docs/examples/reuse.py ARTIFACT FOLDER [--steps 50]

ARTIFACT is what `volcast export BUNDLE --reuse -o ARTIFACT` wrote. Writes a picture: the volume of the whole run, that
of reuse = 5, and their difference (in its own range).
"""

import argparse
from pathlib import Path

import numpy as np

import volcast
from volcast.runtime.picture import mosaic, save_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)

    with volcast.load(given.artifact) as model:
        whole = model.sample(seed=1, steps=given.steps)
        reused = model.sample(seed=1, steps=given.steps, reuse=5)
    change = np.abs(reused.array - whole.array)
    share = np.percentile(change, 99) / np.ptp(whole.array)
    shown = [whole, reused, volcast.Volume(change, whole.affine, whole.spacing_mm)]
    captions = ["whole steps", "reuse 5", f"what changed: 99 % below {share:.1%} of the range"]
    save_picture(mosaic(shown, captions, scale=2), given.folder / "reuse.png")


if __name__ == "__main__":
    main()
