"""`benchmarks/fewer_steps` on Gaussian data with its exact denoiser: what it draws, keeps and compares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import volcast
from volcast.benchmarks import fewer_steps
from volcast.benchmarks.fewer_steps import REFERENCE, SOLUTION, as_markdown, compare
from volcast.benchmarks.fewer_steps_volumes import TIMES, Sampler, draw, read_volumes, seconds, volume_path
from volcast.export.evaluation_images import read_images
from volcast.export.frechet import frechet

ROOT = Path(__file__).parent.parent
FEW, MANY = Sampler(scheduler="ddim", steps=2), Sampler(scheduler="ddim", steps=100)
NOISY = Sampler(scheduler="ddpm", steps=20)
TODO = {REFERENCE: 4, SOLUTION: 2, FEW: 4, MANY: 4, NOISY: 4}


@pytest.fixture(scope="module")
def drawn(gaussian: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    seen: list[tuple[int, int]] = []
    draw(
        volcast.load(gaussian, engine="onnxruntime", threads=1), TODO, folder, lambda *done: seen.append(done)
    )
    assert seen == [(done, 18) for done in range(1, 19)]
    return folder


def test_a_volume_is_its_seed_s_whatever_the_sampler(gaussian: Path, drawn: Path) -> None:
    """Conditions are one a seed; a volume is `Model.sample`'s of seed, condition, scheduler and steps."""
    few, many = read_volumes(drawn, FEW, 4), read_volumes(drawn, MANY, 4)
    means = [each.mean(axis=(1, 2, 3, 4)) for each in (few, many)]
    assert np.ptp(means[1]) > 0.1  # the mean is anterior - posterior + 10 ratio
    # 2 steps leave the mean where 100 do, by the exact denoiser; 192 voxels of deviation 0.5 are the same noise's.
    assert np.corrcoef(*means)[0, 1] > 0.99
    assert many.std(axis=(1, 2, 3, 4)).mean() > 1.1 * few.std(axis=(1, 2, 3, 4)).mean()


def test_it_resumes(gaussian: Path, drawn: Path) -> None:
    """What lies there stays; what is missing is drawn again, the same volume, its time told by the last line."""
    paths = {each: volume_path(drawn, each, 1) for each in (FEW, NOISY)}
    kept, lost = paths[FEW].stat().st_mtime_ns, read_volumes(drawn, NOISY, 4)
    lines = (drawn / TIMES).read_text().splitlines()
    paths[NOISY].unlink()
    draw(volcast.load(gaussian, engine="onnxruntime", threads=1), TODO, drawn, lambda *done: None)
    np.testing.assert_array_equal(read_volumes(drawn, NOISY, 4), lost)
    assert paths[FEW].stat().st_mtime_ns == kept
    found = (drawn / TIMES).read_text().splitlines()
    assert found[:-1] == lines and seconds(drawn, NOISY, 4)[1] == json.loads(found[-1])["seconds"]


def test_the_numbers(drawn: Path) -> None:
    real = read_images(drawn / MANY.name)
    found = compare(drawn, [FEW, MANY, NOISY], 4, 2, real)
    rows = {(row["scheduler"], row["steps"]): row for row in found["samplers"]}
    images = {each: read_volumes(drawn, each, 4) for each in (REFERENCE, FEW, MANY)}
    for each in (FEW, MANY):
        row = rows["ddim", each.steps]
        assert row["frechet"] == pytest.approx(frechet(images[each], images[REFERENCE]), rel=1e-12)
        assert row["frechet_interval"][0] <= row["frechet"] <= row["frechet_interval"][1]
    assert rows["ddim", 2]["frechet"] > 3 * rows["ddim", 100]["frechet"]
    assert rows["ddim", 100]["frechet_real"] == pytest.approx(0, abs=1e-12)
    assert rows["ddim", 100]["ms_ssim"] > rows["ddim", 2]["ms_ssim"]
    # A seed of DDPM is another volume than DDIM's: as unlike as other seeds', and so it is left out.
    assert found["ms_ssim_reference"] < 0.5 < rows["ddim", 100]["ms_ssim"]
    assert "ms_ssim" not in rows["ddpm", 20] and "frechet" not in rows["ddpm", 1000]
    table = as_markdown(found)
    assert table.splitlines()[0] == "| steps | ddim | ddpm |" and "| 1000 |  | reference (" in table


def test_the_table_is_what_was_measured() -> None:
    lines = (ROOT / "benchmarks" / "results" / "fewer_steps.jsonl").read_text(encoding="utf-8").splitlines()
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    last: Mapping[str, object] = json.loads(lines[-1])
    assert as_markdown(last) in text


def test_the_command_writes_one_line(
    gaussian: Path, drawn: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(fewer_steps, "SCHEDULERS", ("ddim",))
    monkeypatch.setattr(fewer_steps, "STEPS", (2,))
    monkeypatch.setattr(fewer_steps, "PAIRED", 2)
    fewer_steps.main(drawn, gaussian, volumes=4, real=None, threads=1, output=tmp_path / "x.jsonl")
    (line,) = (tmp_path / "x.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (
        found["benchmark"] == "fewer_steps" and found["environment"]["threads"] == 1 and found["volumes"] == 4
    )
    assert as_markdown(found) in capsys.readouterr().out
