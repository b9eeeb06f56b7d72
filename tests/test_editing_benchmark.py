"""The benchmark of editing: which crops it reads and how, and what it tells of two volumes."""

from pathlib import Path

import numpy as np

from volcast.benchmarks.editing import alike, read_crops


def test_crops_are_scaled_as_the_models_were_trained(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (3, 40, 56, 40), np.uint8)
    y = np.zeros_like(x)
    y[2, :16, :12, :10] = 1  # 1920 mm^3: (1920 - 1054) / 1536
    names = np.array(["a.nii.gz", "b.nii.gz", "c.nii.gz"])
    np.savez(tmp_path / "crops.npz", x=x, y=y, n=names)
    (tmp_path / "held_out.txt").write_text("b.nii.gz\nc.nii.gz\n")
    found = read_crops(tmp_path / "crops.npz", tmp_path / "held_out.txt", 2)
    assert len(found) == 2 and len(read_crops(tmp_path / "crops.npz", tmp_path / "held_out.txt", 1)) == 1
    crop, condition = found[1]
    part = x[2, 4:36, 4:52, 4:36].astype(np.float64)
    expected = np.clip((part - part.mean()) / part.std() * 0.18 + 0.5, 0, 1)
    np.testing.assert_allclose(crop, expected, atol=1e-5)  # a mean of 49152 bytes in float32
    assert condition == {"anterior": 866 / 1536, "posterior": 0.0}


def test_what_is_told() -> None:
    noise = np.random.default_rng(0).standard_normal((20, 20, 20)).astype(np.float32)
    found = alike(noise * 0 + 0.5 + 0.1 * noise, noise * 0 + 0.5 + 0.2 * noise)
    # The difference has standard deviation 0.1 of a range of 1: 20 dB, to the draw's 1 / sqrt(2 * 8000).
    assert abs(found["psnr"] - 20) < 20 / np.log(10) * 5 / np.sqrt(16000) and found["r"] > 0.999999
