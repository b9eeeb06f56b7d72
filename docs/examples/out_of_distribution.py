"""Images unlike those of training: python docs/examples/out_of_distribution.py TOKENS FOLDER [--samples 8] [--steps 25]

TOKENS is what `volcast export src/volcast/models/hippocampus --config configs/transformer.json -o TOKENS` wrote. Samples of
the bundled diffusion model stand for scans, as they are and altered as a whole. The token model tells log p of each; told
are nats (-log p) a token and the AUC of knowing the two apart; the picture shows log p below the first scan (bright: likely).
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import volcast
from volcast.runtime.picture import mosaic, save_picture
from volcast.runtime.roc import roc

NOISE = np.random.default_rng(0).normal(0, 0.1, (32, 48, 32))
ALTERED = {
    "inverted": lambda x: 1 - x,
    "upside down": lambda x: x[:, :, ::-1],
    "moved by 8 voxels": lambda x: np.roll(x, 8, 1),
    "noise of 0.1 added": lambda x: x + NOISE,
    "blurred": lambda x: sliding_window_view(np.pad(x, 1, mode="edge"), (3, 3, 3)).mean((3, 4, 5)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    model = volcast.load(given.tokens)
    scans = list(volcast.load().sample_many(given.samples, seed=4, steps=given.steps))
    above, below, known = [], [], []
    for name, change in {"as it was": lambda x: x, **ALTERED}.items():
        images = np.stack([np.clip(change(scan.array), 0, 1) for scan in scans]).astype(np.float32)
        log_p = model.likelihood(images[:, None])
        scores = log_p.mean((1, 2, 3))
        known = known or list(scores)
        print(f"{name}: {-scores.mean():.2f} nats a token, AUC {roc(known, scores).auc:.2f}")
        voxels = np.kron(log_p[0], np.ones(np.divide(images[0].shape, log_p[0].shape).astype(int)))
        above.insert(0, images[0, :, 24])  # the first coronal plane lies on the left, where axis 0 ends
        below.insert(0, voxels[:, 24])
    rows = [
        volcast.Volume(np.concatenate(one).astype(np.float32), np.eye(4), (1, 1)) for one in (above, below)
    ]
    captions = [", ".join(("as it was", *ALTERED)), "log p of the tokens"]
    save_picture(mosaic(rows, captions), given.folder / "out_of_distribution.png")


if __name__ == "__main__":
    main()
