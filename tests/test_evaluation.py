"""`volcast evaluate`: its numbers against MONAI's metrics and closed forms, and its two flags."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics.mmd import MMDMetric
from monai.metrics.regression import MultiScaleSSIMMetric, PSNRMetric, SSIMMetric
from PIL import Image

from volcast.__main__ import app
from volcast.export.evaluation import Evaluation, Score, evaluate
from volcast.export.evaluation_flags import PAIRS, pairs
from volcast.export.evaluation_images import ImageSet
from volcast.export.evaluation_interval import half_sample_interval
from volcast.export.frechet import feature_moments
from volcast.runtime.volume import Volume, centred_affine

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "quality.py"


def image_set(images: np.ndarray, prefix: str = "") -> ImageSet:
    names = tuple(f"{prefix}{i}" for i in range(len(images)))
    return ImageSet(folder=Path(prefix or "set"), names=names, images=images, spacing_mm=())


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((*shape[:1], 1, *shape[1:]), np.float32)


def score(found: Evaluation, name: str) -> Score:
    return next(each for each in found.scores if each.name == name)


@pytest.fixture(scope="module")
def two() -> tuple[np.ndarray, np.ndarray, Evaluation]:
    """Six samples and six real slices with the same names, and what is found."""
    real = noise(6, 16, 20)
    samples = 0.8 * noise(6, 16, 20, seed=1) + 0.1
    return samples, real, evaluate(image_set(samples), image_set(real))


def test_the_metrics_are_monai_s(two) -> None:
    samples, real, found = two
    peak = float(real.max()) - float(real.min())
    x, y = torch.from_numpy(samples), torch.from_numpy(real)
    # MONAI's linear kernel sums over voxels; ours is their mean. In float64 both, to rounding.
    wanted = float(MMDMetric()(y.double(), x.double())) / real[0].size
    assert score(found, "MMD").value == pytest.approx(wanted, rel=1e-9)
    # The mean of float32 values that are MONAI's own, one by one or as a batch.
    weights = np.array([0.0448, 0.2856]) / (0.0448 + 0.2856)  # 16 voxels an axis: two scales
    metrics = {
        "PSNR in dB, pairs": PSNRMetric(max_val=peak),
        "SSIM, pairs": SSIMMetric(2, peak, win_size=7),
        "MS-SSIM, pairs": MultiScaleSSIMMetric(2, peak, kernel_size=7, weights=list(weights)),
    }
    for name, metric in metrics.items():
        assert score(found, name).value == pytest.approx(float(metric(x, y).mean()), rel=1e-6), name
    a, b = np.triu_indices(6, 1)
    alike = float(metrics["MS-SSIM, pairs"](x[a], x[b]).mean())
    assert score(found, "MS-SSIM, two samples").value == pytest.approx(alike, rel=1e-6)


def test_equal_arguments_give_equal_numbers_and_another_seed_other_intervals(two) -> None:
    samples, real, found = two
    assert evaluate(image_set(samples), image_set(real)).as_dict() == found.as_dict()
    other = evaluate(image_set(samples), image_set(real), seed=1)
    for name in ("Fréchet distance", "MMD"):
        assert score(other, name).value == pytest.approx(score(found, name).value, rel=1e-12)
        assert score(other, name).interval != score(found, name).interval


def test_every_interval_holds_its_value(two) -> None:
    for each in two[2].scores:
        assert each.interval is None or each.interval[0] <= each.value <= each.interval[1], each


def test_a_shift_in_closed_form() -> None:
    """By c: the Fréchet distance is the mean of c^2 / variance over the scales (the other features stay), PSNR the
    peak over c, and the MMD c^2, less the variance of a mean of n, which the unbiased estimate takes off once more than
    equal sets have."""
    real = noise(8, 16, 16)
    found = evaluate(image_set(real + np.float32(0.25)), image_set(real))
    spread = [covariance[0, 0] for _, covariance in feature_moments(real, (16, 16)).pooled()]
    wanted = np.mean([0.0625 / each for each in spread])
    # x + 0.25 is rounded to 2^-24: 1e-7 of the shift.
    assert score(found, "Fréchet distance").value == pytest.approx(wanted, rel=1e-5)
    peak = float(real.max() - real.min())
    assert score(found, "PSNR in dB, pairs").value == pytest.approx(20 * math.log10(peak / 0.25), abs=1e-4)
    flat = real.reshape(8, -1).astype(np.float64)
    own = ((flat - flat.mean(axis=0)) ** 2).sum() / 7 / flat.shape[1]
    assert score(found, "MMD").value == pytest.approx(0.0625 - 2 * own / 8, rel=1e-5)


def test_of_one_set_with_itself() -> None:
    real = image_set(noise(5, 8, 8))
    found = evaluate(real, real)
    assert score(found, "Fréchet distance").value < 1e-12
    pair = score(found, "PSNR in dB, pairs")
    assert pair.value == math.inf and pair.interval is None
    assert score(found, "SSIM, pairs").value == pytest.approx(1, abs=1e-6)
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert next(each for each in data["scores"] if "PSNR" in each["name"])["value"] is None
    assert found.flags[0].value == 5 and found.flags[0].raised


def test_the_bundled_model_s_size_and_other_names() -> None:
    """Volumes smaller than MONAI's own kernels take, as many samples as they come, no pairs."""
    found = evaluate(image_set(noise(4, 32, 48, 32), "s"), image_set(noise(5, 32, 48, 32, seed=1), "r"))
    assert "no names in common" in found.subject and "4 samples and 5 real" in found.subject
    assert not [each for each in found.scores if "pairs" in each.name]
    assert "of 4 images a side" in score(found, "MMD").note
    assert all(math.isfinite(each.value) for each in found.scores)


def test_a_copy_is_flagged_and_named() -> None:
    real = noise(6, 16, 16)
    samples = noise(6, 16, 16, seed=1)
    assert not evaluate(image_set(samples, "s"), image_set(real, "r")).flags[0].raised
    # Uniform noise differs by sqrt(1 / 6) = 0.41 from other noise; a copy that is off by 0.05 is a copy.
    samples[2] = real[4] + 0.05 * np.sign(samples[2] - 0.5)
    found = evaluate(image_set(samples, "s"), image_set(real, "r"))
    flag = found.flags[0]
    assert flag.raised and flag.value == 1 and "1 of 6 samples" in flag.text
    assert found.as_dict()["nearest"][2]["real"] == "r4"
    assert found.as_dict()["nearest"][2]["distance"] == pytest.approx(0.05, rel=1e-5)
    assert "memorisation: FLAGGED" in found.as_text()


def test_a_copy_among_real_images_that_are_all_one() -> None:
    real = np.repeat(noise(1, 8, 8), 4, axis=0)
    flag = evaluate(image_set(real[[0, 0, 0, 0]], "s"), image_set(real, "r")).flags[0]
    assert flag.raised and flag.value == 4


def test_low_diversity_is_flagged() -> None:
    real, few = noise(8, 16, 16), noise(8, 16, 16, seed=1)
    independent = evaluate(image_set(few, "s"), image_set(real, "r")).flags[1]
    # Noise of the same kind is as diverse: the ratio of means over 28 pairs.
    assert not independent.raised and independent.value == pytest.approx(1, abs=0.1)
    one = evaluate(image_set(few[[0] * 8], "s"), image_set(real, "r")).flags[1]
    assert one.raised and one.value == pytest.approx(0, abs=1e-5)
    # Two images, four times each: of 28 pairs 16 are of two images, so 16/28 of the diversity.
    half = evaluate(image_set(few[[0, 1] * 4], "s"), image_set(real, "r")).flags[1]
    assert half.raised and half.value == pytest.approx(16 / 28, abs=0.1)


@pytest.mark.parametrize("n", [4, 14, 15, 60, 260])
def test_pairs_are_distinct_and_even(n: int) -> None:
    found = pairs(n, np.random.default_rng(0))
    assert len(found) == min(n * (n - 1) // 2, PAIRS)
    assert len({frozenset(pair) for pair in found.tolist()}) == len(found)
    assert found.min() >= 0 and found.max() < n and (found[:, 0] != found[:, 1]).all()
    often = np.bincount(found.ravel(), minlength=n)
    assert often.max() - often.min() <= 2


@pytest.mark.parametrize("n", [200, 201])
def test_an_interval_of_a_mean(n: int) -> None:
    """x +- 1.96 s / sqrt(n): the variance of the mean of a half is s^2 / (n/2) (1 - 1/2). Quantiles of 200 replicates
    are off by a tenth of their width (sqrt(p q / 200) / density), thrice that is allowed."""
    x = np.random.default_rng(1).standard_normal(n)
    interval = half_sample_interval(lambda rows: x[rows].mean(), (n,), x.mean(), np.random.default_rng(0))
    assert interval is not None
    width = 1.96 * x.std(ddof=1) / math.sqrt(n)
    assert interval[0] == pytest.approx(x.mean() - width, abs=0.3 * width)
    assert interval[1] == pytest.approx(x.mean() + width, abs=0.3 * width)


def test_no_image_meets_itself_in_an_interval() -> None:
    def distinct(a: np.ndarray, b: np.ndarray) -> float:
        assert len(set(a.tolist())) == len(a) == 5 and len(b) == 3
        return 0.0

    assert half_sample_interval(distinct, (10, 7), 0.0, np.random.default_rng(0)) == (0, 0)


def test_the_command(tmp_path: Path, capfd) -> None:
    for name, seed in (("samples", 0), ("real", 1)):
        (tmp_path / name).mkdir()
        for place, image in enumerate(noise(5, 8, 8, 8, seed=seed)[:, 0]):
            volume = Volume(image, centred_affine(image.shape, (1.0,) * 3), (1.0,) * 3)
            volume.save(tmp_path / name / f"{place}.nii.gz")
    given = ["evaluate", str(tmp_path / "samples"), str(tmp_path / "real")]
    assert app([*given, "--json", "--plot", str(tmp_path / "p.png")]) == 0
    data = json.loads(capfd.readouterr().out)
    assert {"Fréchet distance", "MMD", "SSIM, pairs", "MS-SSIM, two samples"} <= {
        s["name"] for s in data["scores"]
    }
    assert [flag["raised"] for flag in data["flags"]] == [False, False] and len(data["nearest"]) == 5
    with Image.open(tmp_path / "p.png") as picture:
        assert len(picture.convert("L").getcolors()) > 10
    assert app(given) == 0
    out = capfd.readouterr().out
    assert "5 pairs by name" in out and "low diversity: no" in out
    for bad, message in (
        (["--plot", "p.jpg"], "need a name that ends in .png"),
        (["--seed", "-1"], "seed=-1"),
    ):
        assert app([*given, *bad]) == 2
        assert message in capfd.readouterr().err


def test_real_images_that_are_flat(tmp_path: Path) -> None:
    flat = np.zeros((4, 1, 8, 8), np.float32)
    with pytest.raises(ValueError, match="every voxel of r is 0"):
        evaluate(image_set(noise(4, 8, 8), "s"), image_set(flat, "r"))


def test_the_example_runs(gaussian: Path, tmp_path: Path) -> None:
    given = [str(tmp_path), "--artifact", str(gaussian), "--samples", "4", "--steps", "4"]
    done = subprocess.run([sys.executable, str(EXAMPLE), *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 samples and 4 real images of 8 x 12 x 8" in done.stdout and "memorisation: no" in done.stdout
    with Image.open(tmp_path / "quality.png") as picture:
        assert picture.width > 100
