"""The bundled model with its trained ControlNet: by `--mask`, by Python, by the example, and against MONAI."""

from __future__ import annotations

import runpy
import subprocess
import sys
from os import environ
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from volcast.__main__ import app
from volcast.export.bundle import read_bundle
from volcast.export.verify import verify
from volcast.runtime.artifact import read_artifact
from volcast.runtime.default_artifact import BUNDLE, default_artifact

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "label_map.py"
AFFINE = np.array([[1.0, 0, 0, 5], [0, 1, 0, -7], [0, 0, 1, 9], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def artifact(controlled_cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(controlled_cache))
        return default_artifact(controlled=True)


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_the_hint_encoder_has_left_the_step(artifact: Path) -> None:
    spec = read_artifact(artifact)
    step, prepare = spec.programs["step"], spec.programs["prepare"]
    assert {"mask", "context", "controlnet_scale"} == {tensor.name for tensor in prepare.inputs}
    assert not {"mask", "context"} & {tensor.name for tensor in step.inputs}
    # conv 3^3 of 3 -> 16, 16 -> 16 at full size; 16 -> 32, 32 -> 32 at half; 32 -> 64, 64 -> 64 at a quarter: 2 a MAC.
    voxels = 32 * 48 * 32
    encoder = 2 * 27 * voxels * ((3 * 16 + 16 * 16) + (16 * 32 + 32 * 32) / 8 + (32 * 64 + 64 * 64) / 64)
    assert step.flops_before - step.flops >= encoder
    assert next(one for one in spec.conditions if one.name == "mask").labels == (
        "background",
        "anterior",
        "posterior",
    )


def test_against_monai_s_own_inferer_with_guidance(artifact: Path, example: dict[str, Any]) -> None:
    bundle = read_bundle(BUNDLE, controlnets=["controlnet_def"])
    condition = {"mask": example["label_map"](), "mask_scale": 0.8, "anterior": 0.3}
    found = verify(artifact, bundle, steps=2, guidance=2.0, condition=condition)
    assert found.passed, found.as_text()


def test_a_mask_on_the_command_line(
    controlled_cache: Path, example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(controlled_cache))
    image = nibabel.Nifti1Image(example["label_map"]().astype(np.uint8), AFFINE)
    nibabel.save(image, tmp_path / "label.nii.gz")
    command = [
        "sample",
        "--mask",
        str(tmp_path / "label.nii.gz"),
        "--steps",
        "1",
        "-o",
        str(tmp_path / "out.nii.gz"),
    ]
    assert app(command) == 0
    out = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(out.affine, AFFINE)
    assert out.shape == (32, 48, 32)

    nibabel.save(nibabel.Nifti1Image(np.full((32, 48, 32), 7, np.uint8), AFFINE), tmp_path / "label.nii.gz")
    assert app(command) == 2
    assert "unknown labels 7: the model knows 0 background, 1 anterior, 2 posterior" in capfd.readouterr().err


def test_the_example_runs(controlled_cache: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path), "--steps", "2"],
        env={**environ, "XDG_CACHE_HOME": str(controlled_cache)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = {"label.nii.gz", "label_map.png", "strength_0.nii.gz", "strength_0.5.nii.gz", "strength_1.nii.gz"}
    assert {path.name for path in tmp_path.iterdir()} == names
    weak, strong = (nibabel.load(tmp_path / f"strength_{one}.nii.gz").get_fdata() for one in ("0", "1"))
    assert np.abs(weak - strong).mean() > 0.01  # of a range of 1: another scan, not rounding
