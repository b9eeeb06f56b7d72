"""Ten weights of guidance in one call: python docs/examples/guidance_sweep.py FOLDER [--steps 50] [--last 10]

The bundled model is asked for a large anterior part, once with its null condition in guidance's other branch and once
with a negative condition, a large posterior part. Every volume has the same noise. Writes one picture of the middle planes.
"""

import argparse
from pathlib import Path

import volcast
from volcast.runtime.picture import mosaic, save_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--last", type=int, default=10, help="The largest weight.")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)

    wanted, unwanted = {"anterior": 0.9, "posterior": 0.1}, {"anterior": 0.1, "posterior": 0.9}
    weights, shown, captions = range(1, given.last + 1), [], []
    with volcast.load() as model:
        for name, negative in (("null", None), ("negative", unwanted)):
            volumes = model.sample_many(
                1, seed=2, guidance=weights, condition=wanted, negative=negative, steps=given.steps
            )
            for weight, volume in zip(weights, volumes, strict=True):
                if weight in (1, 3, given.last):
                    shown.append(volume)
                    captions.append(f"{name}, weight {weight}")
    save_picture(mosaic(shown, captions), given.folder / "guidance_sweep.png")


if __name__ == "__main__":
    main()
