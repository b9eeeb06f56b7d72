"""Volumes token by token, and how likely images are: python docs/examples/tokens.py FOLDER [--artifact DIR] [--samples 3]

Samples the bundled VQVAE with its transformer, tells the likelihood of each sample and of the same turned back to
front, which the model has never seen, and writes a picture: the samples, the last one turned, and the log-likelihood
of its tokens (bright: likely). Without an artifact it is exported first, which takes PyTorch and MONAI and a minute.
"""

import argparse
from pathlib import Path

import numpy as np

import volcast
from volcast.runtime.default_artifact import BUNDLE
from volcast.runtime.picture import mosaic, save_picture


def export(folder: Path) -> Path:
    """The bundled model as an artifact; `volcast export BUNDLE --config configs/transformer.json -o FOLDER` does the same."""
    from volcast.export.transformer_artifact import export_transformer
    from volcast.export.transformer_bundle import read_transformer

    export_transformer(
        read_transformer(BUNDLE, config=Path("configs/transformer.json")), folder, replace=True
    )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--samples", type=int, default=3)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)

    model = volcast.load(given.artifact or export(given.folder / "artifact"))
    shown, captions = [], []
    for number, volume in enumerate(model.sample_many(given.samples, seed=3, batch=given.samples, top_p=0.9)):
        volume.save(given.folder / f"tokens_{number}.nii.gz")
        turned = np.ascontiguousarray(volume.array[:, ::-1])
        (log_p,), (log_q,) = model.likelihood(volume), model.likelihood(turned)
        print(f"sample {number}: {-log_p.mean():.3f} nats a token, back to front {-log_q.mean():.3f}")
        shown.append(volume)
        captions.append(f"sample {number}")
    scale = [size // tokens for size, tokens in zip(turned.shape, log_q.shape, strict=True)]
    voxels = np.kron(log_q, np.ones(scale)).astype(np.float32)
    shown += [volcast.Volume(array, volume.affine, volume.spacing_mm) for array in (turned, voxels)]
    captions += ["back to front", "log p of its tokens"]
    save_picture(mosaic(shown, captions), given.folder / "tokens.png")


if __name__ == "__main__":
    main()
