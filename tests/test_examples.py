"""Examples of docs/ that no other file runs: out_of_distribution.py, translate.py, maisi.py, at few steps."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from volcast.runtime.volume import Volume, centred_affine, read_nifti

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
LATENT = (4, 4, 4)
"""MAISI's, a quarter of the volume along each axis."""

LEVELS = {
    "num_channels": [32, 64],
    "attention_levels": [False, True],
    "num_head_channels": [0, 32],
    "num_res_blocks": 1,
}
MAISI: dict[str, dict[str, Any]] = {
    "diffusion_unet_def": LEVELS,
    "controlnet_def": LEVELS,
    "autoencoder_def": {"num_channels": [32, 32, 32], "num_res_blocks": [1, 1, 1]},
}


@pytest.fixture
def run(default_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """`run(name, *words) -> str`: what the example prints."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(default_cache))

    def started(name: str, *words: object) -> str:
        monkeypatch.setattr("sys.argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capfd.readouterr().out

    return started


def test_out_of_distribution(run: Any, token_artifact_folder: Path, tmp_path: Path) -> None:
    told = run(
        "out_of_distribution.py", token_artifact_folder, tmp_path / "made", "--samples", 1, "--steps", 2
    )
    rows = re.findall(r"(.+): ([\d.]+) nats a token, AUC ([\d.]+)\n", told)
    nats = {name: float(number) for name, number, _ in rows}
    assert len(nats) == 6 and float(rows[0][2]) == 0.5
    # What turns the anatomy over costs half a nat a token or more (768 tokens), as in test_token_bundled.
    assert min(nats["inverted"], nats["upside down"]) > nats["as it was"] + 0.5
    with Image.open(tmp_path / "made" / "out_of_distribution.png") as picture:
        assert picture.width == 6 * 32 * 3


def test_translate(run: Any, tmp_path: Path) -> None:
    told = run("translate.py", tmp_path / "made", "--steps", 4)
    rows = re.findall(r"strength [\d.]+: correlation ([\d.]+) with the scan, deviation ([\d.]+)\n", told)
    # 1, 2 and 3 of 4 steps: ever less is left of the scan, and the seeds differ ever more.
    left, spread = np.array(rows, float).T
    assert len(rows) == 3 and (np.diff(left) < 0).all() and (np.diff(spread) > 0).all()
    variance = read_nifti(tmp_path / "made" / "variance.nii.gz")
    assert np.sqrt(variance.array).mean() == pytest.approx(spread[-1], abs=5e-4)  # as printed
    with Image.open(tmp_path / "made" / "strength.png") as picture:
        assert picture.height > 5 * 48


def test_maisi(run: Any, zoo_bundle: Any, tmp_path: Path) -> None:
    narrow = {f"{id}__{key}": value for id, values in MAISI.items() for key, value in values.items()}
    bundle = zoo_bundle("maisi_rflow", ["controlnet_def"], latent_shape=[4, *LATENT], **narrow)
    # As a user's bundle has it: the config alone says what the networks are.
    file = tmp_path / "maisi_rflow" / "configs" / "inference.json"
    config = json.loads(file.read_text()) | {"latent_shape": [4, *LATENT]}
    config |= {id: config[id] | values for id, values in MAISI.items()}
    file.write_text(json.dumps(config))
    shape = tuple(4 * size for size in LATENT)
    labels = np.zeros(shape, np.float32)
    labels[: shape[0] // 2] = 25
    mask = Volume(labels, centred_affine(shape, bundle.spacing_mm), bundle.spacing_mm)
    mask.save(tmp_path / "mask.nii.gz")
    made = tmp_path / "made"
    told = run("maisi.py", file.parent.parent, made, "--mask", tmp_path / "mask.nii.gz", "--steps", 2)
    found = re.fullmatch(r"\(16, 16, 16\), 1.5 x 1.5 x 1.5 mm, (-?\d+)\.\.(-?\d+) HU, median -?\d+\n", told)
    ct = read_nifti(made / "ct.nii.gz").array
    assert found is not None and -1000 == int(found[1]) < int(found[2]) == round(ct.max()) <= 1000
    assert (ct[labels == 0] == -1000).all() and np.ptp(ct[labels != 0]) > 0
