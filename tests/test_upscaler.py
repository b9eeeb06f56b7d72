"""The trained upscaler: against MONAI, and the example of docs/text_and_upscaling.md."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from volcast.benchmarks.upscaler import UPSCALER, coarsened, enlarged
from volcast.export.artifact import export_bundle
from volcast.export.bundle import read_bundle
from volcast.export.verify import verify

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "upscale.py"


@pytest.fixture(scope="module")
def artifact(shared_folder: Any) -> Path:
    folder: Path = shared_folder(
        "trained upscaler", lambda place: export_bundle(read_bundle(UPSCALER), place, batch=(1, 1))
    )
    return folder


def test_trained_weights_against_monai(artifact: Path) -> None:
    low_res = np.random.default_rng(0).random((1, 16, 24, 16), np.float32)
    given = {"low_res": low_res, "noise_level": 3}
    found = verify(artifact, read_bundle(UPSCALER), engine="onnxruntime", threads=1, steps=2, condition=given)
    assert found.passed, found.as_text()


def test_enlarged_keeps_what_is_linear() -> None:
    x = np.add.outer(np.add.outer(np.arange(8.0), 2 * np.arange(6.0)), -np.arange(4.0))
    found, inner = enlarged(coarsened(x)), (slice(1, -1),) * 3
    # Small halves and quarters: exact but at the edges, which are repeated.
    np.testing.assert_array_equal(found[inner], x[inner])


def test_the_example(
    artifact: Path,
    default_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(default_cache))
    monkeypatch.setattr("sys.argv", ["upscale.py", str(artifact), str(tmp_path / "made"), "--steps", "3"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    told = re.findall(r"([\w ]+): PSNR ([\d.]+) dB, sharpness ([\d.]+)\n", capfd.readouterr().out)
    psnr, sharp = ({name: float(row[place]) for name, *row in told} for place in (0, 1))
    assert list(psnr) == ["interpolated", "upscaled", "mean of 5"]
    assert sharp["interpolated"] < sharp["mean of 5"] < sharp["upscaled"]
    # The mean of five is nearer than any of them on average: the error's variance goes (Jensen).
    assert psnr["mean of 5"] > psnr["upscaled"]
    with Image.open(tmp_path / "made" / "upscale.png") as picture:
        assert picture.height > 4 * 96
