"""How near do inpainting and healing of the bundled models come to what was hidden, and to what was put in?

`python -m volcast.benchmarks.editing CROPS.npz HELD_OUT.txt [COUNT [STEPS]]`

The crops are those that the models were not trained on. One line for each way to paint a hidden cube anew: what the painted
voxels have in common with the hidden ones, the hidden part replaced by the crop's mean before the encoder sees it; then one
for healing: which tokens it replaces where a bright sphere was put into the crop.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volcast.export.transformer_artifact import export_transformer
from volcast.export.transformer_bundle import read_transformer
from volcast.runtime.default_artifact import BUNDLE
from volcast.runtime.ensemble import Ensemble
from volcast.runtime.inpaint import Inpaint
from volcast.runtime.pipeline import Model, load
from volcast.runtime.sampler import Method
from volcast.runtime.token_model import TokenModel, load_tokens

from .bench import environment

Crop = NDArray[np.float32]
THREADS = 1
CUBE = (slice(8, 24), slice(16, 32), slice(8, 24))
"""Half of each axis or a third: 8 % of the voxels, 4 x 4 x 4 latent ones."""
WAYS: tuple[tuple[Method, int], ...] = (("ddim", 1), ("ddim", 4), ("ddpm", 1), ("ddpm", 4), ("ddpm", 10))
SEEDS = 5
RADIUS = 5


def read_crops(crops: Path, held_out: Path, count: int) -> list[tuple[Crop, dict[str, float]]]:
    """The held-out crops `[32, 48, 32]` as the models' README says they are scaled, with their conditions."""
    given = np.load(crops, allow_pickle=False)
    names = held_out.read_text().split()
    found: list[tuple[Crop, dict[str, float]]] = []
    for x, y, name in zip(given["x"], given["y"], given["n"], strict=True):
        if Path(str(name)).name not in names or len(found) == count:
            continue
        part = x[4:36, 4:52, 4:36].astype(np.float32)
        crop = np.clip((part - part.mean()) / part.std() * 0.18 + 0.5, 0, 1).astype(np.float32)
        volumes = {"anterior": ((y == 1).sum() - 1054) / 1536, "posterior": ((y == 2).sum() - 993) / 1160}
        found.append((crop, {name: float(np.clip(value, 0, 1)) for name, value in volumes.items()}))
    return found


def alike(found: Crop, wanted: Crop) -> dict[str, float]:
    error = float(np.square(found - wanted).mean())
    return {
        "psnr": -10 * float(np.log10(error)),
        "r": float(np.corrcoef(found.ravel(), wanted.ravel())[0, 1]),
    }


def inpainting(
    model: Model, crops: list[tuple[Crop, dict[str, float]]], steps: int
) -> Iterator[dict[str, Any]]:
    """Samples that know nothing of the image, each way to paint, and the mean of an ensemble of the last."""
    mask = np.zeros(crops[0][0].shape, np.float32)
    mask[CUBE] = 1
    blanks = [np.where(mask, crop[mask == 0].mean(), crop).astype(np.float32) for crop, _ in crops]
    coded = [alike(model.decode(model.encode(crop))[0, 0][CUBE], crop[CUBE]) for crop, _ in crops]
    yield {"what": "the autoencoder alone, of the whole crop"} | mean_of(coded)
    free = [alike(model.sample(seed, steps=steps, condition=condition).array[CUBE], crop[CUBE])
            for seed, (crop, condition) in enumerate(crops)]  # fmt: skip
    yield {"what": "a sample that knows nothing of the crop", "steps": steps} | mean_of(free)
    for scheduler, resamples in WAYS:
        rows, calls = [], 0
        for seed, ((crop, condition), blank) in enumerate(zip(crops, blanks, strict=True)):
            volume = model.sample(
                seed, image=blank, inpaint=Inpaint(mask, resamples=resamples), steps=steps, scheduler=scheduler,
                condition=condition,
            )  # fmt: skip
            assert volume.report is not None
            calls = volume.report.steps
            rows.append(alike(volume.array[CUBE], crop[CUBE]))
        yield {"what": "painted", "scheduler": scheduler, "resamples": resamples, "calls": calls} | mean_of(
            rows
        )
    rows, errors = [], []
    for (crop, condition), blank in zip(crops, blanks, strict=True):
        ensemble = Ensemble()
        for volume in model.sample_many(
            SEEDS, 0, image=blank, inpaint=Inpaint(mask), steps=steps, scheduler="ddpm", condition=condition
        ):
            ensemble.add(volume)
        mean, variance = ensemble.mean().array[CUBE], ensemble.variance().array[CUBE]
        rows.append(alike(mean, crop[CUBE]))
        errors.append(float(np.corrcoef(np.sqrt(variance).ravel(), np.abs(mean - crop[CUBE]).ravel())[0, 1]))
    more = {"seeds": SEEDS, "r_of_std_and_error": round(float(np.mean(errors)), 3)}
    yield {"what": "mean of an ensemble", "scheduler": "ddpm", "resamples": 4} | more | mean_of(rows)


def mean_of(rows: list[dict[str, float]]) -> dict[str, Any]:
    return {"crops": len(rows)} | {
        key: round(float(np.mean([row[key] for row in rows])), 3) for key in rows[0]
    }


def healing(model: TokenModel, crops: list[tuple[Crop, dict[str, float]]], quantile: float) -> dict[str, Any]:
    """Of the tokens that are replaced, those that touch the sphere; of those that touch it, the replaced ones; the map."""
    rng = np.random.default_rng(0)
    precision, recall, chance, inside, outside = [], [], [], [], []
    for crop, _ in crops:
        centre = [int(rng.integers(RADIUS + 2, size - RADIUS - 2)) for size in crop.shape]
        grid = np.moveaxis(np.indices(crop.shape), 0, -1)
        sphere = np.square(grid - centre).sum(-1) <= RADIUS**2
        ill = np.where(sphere, 1.0, crop).astype(np.float32)
        found = model.heal(ill, quantile=quantile)
        blocks = [
            n
            for size, small in zip(crop.shape, found.masked.shape, strict=True)
            for n in (small, size // small)
        ]
        touched = sphere.reshape(blocks).any(axis=(1, 3, 5))
        hit = (touched & found.masked).sum()
        precision.append(hit / found.masked.sum())
        recall.append(hit / touched.sum())
        chance.append(touched.mean())
        inside.append(found.difference[0][sphere].mean())
        outside.append(found.difference[0][~sphere].mean())
    named = {"of_the_replaced_in_the_sphere": precision, "by_chance": chance, "of_the_sphere_replaced": recall,
             "map_inside": inside, "map_outside": outside}  # fmt: skip
    means = {name: round(float(np.mean(values)), 4) for name, values in named.items()}
    return {"what": "healed", "quantile": quantile, "crops": len(crops)} | means


def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        sys.exit("usage: python -m volcast.benchmarks.editing CROPS.npz HELD_OUT.txt [COUNT [STEPS]]")
    count, steps = (int(arguments[at]) if len(arguments) > at else most for at, most in ((2, 6), (3, 25)))
    crops = read_crops(Path(arguments[0]), Path(arguments[1]), count)
    where = environment(THREADS)

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line | {"environment": where}), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "tokens"
        spec = export_transformer(read_transformer(BUNDLE, config=Path("configs/transformer.json")), artifact)
        for quantile in (0.03, 0.05):
            tell(healing(load_tokens(artifact, spec, threads=THREADS), crops, quantile))
    with load(threads=THREADS) as model:
        for line in inpainting(model, crops, steps):
            tell(line)


if __name__ == "__main__":
    main(sys.argv[1:])
