"""The Fréchet distance against closed forms and MONAI's, and the features that it stands on."""

import math
import warnings

import numpy as np
import pytest
import torch
from monai.metrics.fid import FIDMetric, get_fid_score

from volcast.export.frechet import feature_moments, features, frechet, frechet_distance


def moments(x: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray]:
    return feature_moments(x, x.shape[2:]).pooled()[{1: 0, 2: 1, 4: 2}[scale]]


def volumes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_gaussians_in_one_direction() -> None:
    # N(1, 4) and N(3, 9): (1 - 3)^2 + (2 - 3)^2.
    found = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]]))
    assert found == pytest.approx(5, rel=1e-12)


def test_gaussians_that_share_their_axes() -> None:
    """The squared difference of means and of deviations along the shared axes; some of them without any spread."""
    generator = np.random.default_rng(1)
    axes, _ = np.linalg.qr(generator.standard_normal((5, 5)))
    a, b = np.array([0, 1, 2, 3, 0.5]), np.array([1, 1, 0, 2, 4.0])
    mean = generator.standard_normal(5)
    found = frechet_distance(np.zeros(5), (axes * a**2) @ axes.T, mean, (axes * b**2) @ axes.T)
    assert found == pytest.approx((mean**2).sum() + ((a - b) ** 2).sum(), rel=1e-6)


def test_against_monai_on_gaussians_that_share_nothing() -> None:
    generator = np.random.default_rng(2)
    mixes = generator.standard_normal((2, 4, 4))
    x, y = (generator.standard_normal((500, 4)) @ mix for mix in mixes)
    with warnings.catch_warnings():
        # MONAI passes SciPy an argument that SciPy is about to lose.
        warnings.simplefilter("ignore")
        wanted = float(get_fid_score(torch.from_numpy(x), torch.from_numpy(y)))
    each = [(z.mean(axis=0), np.cov(z, rowvar=False)) for z in (x, y)]
    assert frechet_distance(*each[0], *each[1]) == pytest.approx(wanted, rel=1e-8)


def test_features_of_a_ramp_and_a_parabola() -> None:
    d, h, w = np.mgrid[:8, :10, :12].astype(np.float64)
    found = features(2 * d - 3 * h + w**2, 1).reshape(6, 8, 10, 5)
    inner = (slice(1, -1),) * 3
    for place, wanted in enumerate((2 * d - 3 * h + w**2, 2 + 0 * d, -3 + 0 * d, 2 * w, 2 + 0 * d)):
        np.testing.assert_allclose(found[..., place], wanted[inner], atol=1e-12)
    # Blocks of 2 average a ramp to one of twice the slope.
    np.testing.assert_allclose(features(d, 2)[:, 1], 2, atol=1e-12)


def test_moments_are_those_of_all_voxels_at_once() -> None:
    x = volumes(3, 2, 6, 7, 8)  # two channels are more voxels
    together = np.concatenate([features(volume, 1) for sample in x for volume in sample])
    mean, covariance = moments(x, 1)
    np.testing.assert_allclose(mean, together.mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(together, rowvar=False), rtol=1e-9, atol=1e-12)


def test_the_distance_of_a_shift_and_of_a_contrast() -> None:
    x = volumes(2, 1, 16, 16, 16)
    assert frechet(x, x) < 1e-12
    # A shift by c moves the value's mean alone, by c of its deviations: the mean of c^2 / variance over the scales.
    spread = [moments(x, scale)[1][0, 0] for scale in (1, 2, 4)]
    assert frechet(x + 0.5, x) == pytest.approx(np.mean([0.25 / each for each in spread]), rel=1e-4)
    # k times the contrast scales all deviations by k: (k - 1)^2 tr C for C in the reference's units, which is 5 features.
    zero = x - x.mean()
    assert frechet(2 * zero, zero) == pytest.approx(5, rel=0.02)


def test_of_some_images_is_as_if_there_were_no_others() -> None:
    x, rows = volumes(5, 1, 8, 8), np.array([0, 3, 4])
    for found, wanted in zip(
        feature_moments(x, (8, 8)).of(rows).pooled(), feature_moments(x[rows], (8, 8)).pooled(), strict=True
    ):
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])


def test_it_is_monai_s_on_the_features_in_the_reference_s_units() -> None:
    """MONAI's FIDMetric on every scale's feature vectors, a voxel a row, averaged over the scales."""
    x, y = volumes(3, 1, 8, 9, 10), 1.3 * volumes(4, 1, 8, 9, 10, seed=1) + 0.2
    wanted = []
    for scale in (1, 2):
        rows = [np.concatenate([features(v, scale) for sample in z for v in sample]) for z in (x, y)]
        unit = rows[1].std(axis=0, ddof=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted.append(float(FIDMetric()(*(torch.from_numpy(each / unit) for each in rows))))
    # SciPy's square root of a product that is nearly normal: half the digits of float64 to spare.
    assert frechet(x, y) == pytest.approx(np.mean(wanted), rel=1e-8)


def test_scales_are_as_many_as_fit() -> None:
    assert frechet(volumes(1, 1, 5, 5), volumes(1, 1, 5, 5, seed=1)) > 0
    with pytest.raises(ValueError, match="need 4 voxels an axis"):
        frechet(volumes(1, 1, 3, 8), volumes(1, 1, 3, 8))


def test_nan_is_not_lost_and_what_never_varies_counts() -> None:
    x, flat = volumes(1, 1, 8, 8), np.zeros((1, 1, 8, 8), np.float32)
    bad = x.copy()
    bad[..., 4, 4] = np.nan
    assert math.isnan(frechet(bad, x)) and math.isnan(frechet(x, bad))
    assert frechet(flat, flat) == 0 and frechet(x, flat) > 0.1
