"""export/similarity against closed forms and MONAI's metric with its own settings."""

import math

import numpy as np
import pytest
import torch
from monai.metrics.regression import MultiScaleSSIMMetric, compute_ms_ssim

from volcast.export.similarity import ms_ssim, psnr, relative_l2, scales


def volume(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((1, 1, *shape), np.float32)


def test_relative_l2() -> None:
    x = volume(4, 5, 6)
    assert relative_l2(x, x) == 0
    # x and 1.25 x are rounded once: 2^-24 of 1.25 at most.
    assert relative_l2(1.25 * x, x) == pytest.approx(0.25, abs=1.25 * 2**-24)
    assert relative_l2(x[..., 1:], x) == math.inf
    assert relative_l2(x, 0 * x) == math.inf
    assert relative_l2(0 * x, 0 * x) == 0


def test_psnr() -> None:
    x = volume(8, 8)
    x.flat[:2] = 0, 1
    assert psnr(x, x) == math.inf
    # The peak is 1 and the mean squared error 2^-10: 10 log10(2^10) dB. x + 2^-5 is rounded at 2^-24.
    assert psnr(x + 2**-5, x) == pytest.approx(100 * math.log10(2), abs=1e-4)


def test_nan_is_not_lost() -> None:
    x, bad = volume(16, 16), volume(16, 16)
    bad[..., 3, 3] = np.nan
    for measure in (relative_l2, psnr, ms_ssim):
        assert math.isnan(measure(bad, x))
        assert math.isnan(measure(x, bad))


def test_ms_ssim_of_a_flat_volume() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 1\): need 2 voxels"):
        ms_ssim(volume(4, 1), volume(4, 1))


def test_ms_ssim_falls_with_noise() -> None:
    smooth = np.sin(np.arange(32 * 48 * 32, dtype=np.float32) / 999).reshape(1, 1, 32, 48, 32)
    noise = volume(32, 48, 32) - 0.5
    found = [ms_ssim(smooth + level * noise, smooth) for level in (0, 0.01, 0.1, 1)]
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert found == sorted(found, reverse=True) and found[-1] < 0.9


@pytest.mark.parametrize("shape", [(32, 48, 32), (64, 64), (200, 200)])
def test_ms_ssim_is_monai_s(shape: tuple[int, ...]) -> None:
    x, y = volume(*shape), volume(*shape, seed=1)
    kernel, count = scales(min(shape))
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:count])
    metric = MultiScaleSSIMMetric(
        len(shape), float(x.max() - x.min()), kernel_size=kernel, weights=list(weights / weights.sum())
    )
    assert ms_ssim(y, x) == float(metric(torch.from_numpy(y), torch.from_numpy(x)))
    assert (kernel, count) == (7, {32: 3, 64: 4, 200: 5}[min(shape)])


@pytest.mark.parametrize("size", [*range(2, 34), 63, 64, 111, 112, 200])
def test_as_many_scales_as_monai_takes(size: int) -> None:
    kernel, count = scales(size)

    def takes(number: int) -> bool:
        x = torch.rand(1, 1, size, size)
        try:
            compute_ms_ssim(x, x, 2, kernel_size=kernel, weights=[1 / number] * number)
        except (ValueError, RuntimeError):
            return False
        return True

    assert takes(count)
    assert count == 5 or not takes(count + 1)
