"""Ensemble against numpy in float64; the maps of `volcast sample --mean --variance`."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

import volcast
from volcast import Ensemble, Volume
from volcast.__main__ import app
from volcast.runtime.volume import centred_affine

SPACING = (1.0, 1.0, 1.0)


def volume(array, spacing=SPACING):
    return Volume(array.astype(np.float32), centred_affine(array.shape, spacing), spacing)


def test_welford_loses_nothing_beside_a_large_mean():
    """Of values about 10^5 with deviation 1, sums of squares in float32, or even E[x^2] - E[x]^2 there, would be noise."""
    arrays = np.random.default_rng(0).normal(1e5, 1.0, (40, 3, 4, 5)).astype(np.float32)
    ensemble = Ensemble()
    for array in arrays:
        ensemble.add(volume(array))
    # The maps are float32, to half a unit in the last place.
    np.testing.assert_allclose(ensemble.mean().array, arrays.mean(0, dtype=np.float64), rtol=6e-8)
    np.testing.assert_allclose(ensemble.variance().array, arrays.astype(np.float64).var(0, ddof=1), rtol=1e-7)
    np.testing.assert_array_equal(ensemble.mean().affine, volume(arrays[0]).affine)


def test_refusals():
    ensemble = Ensemble()
    with pytest.raises(ValueError, match=r"\[ensemble\] 0 volumes: need 1 or more"):
        ensemble.mean()
    ensemble.add(volume(np.zeros((2, 2, 2))))
    with pytest.raises(ValueError, match=r"1 volumes: need 2 or more"):
        ensemble.variance()
    for other in (volume(np.zeros((2, 2, 3))), volume(np.zeros((2, 2, 2)), (2.0, 1.0, 1.0))):
        with pytest.raises(ValueError, match=r"add samples of one request"):
            ensemble.add(other)


def run(gaussian: Path, *more: object) -> int:
    return app(["sample", *(str(one) for one in (gaussian, "--engine", "onnxruntime", "--steps", 3, *more))])


def test_maps_of_the_command_line(gaussian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = ("--mean", tmp_path / "mean.nii.gz", "--variance", tmp_path / "variance.nii.gz")
    assert run(gaussian, "-n", 5, "--batch", 2, "--json", *maps) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mean.nii.gz", "variance.nii.gz"]
    rows = json.loads(capsys.readouterr().out)
    assert [(row.get("mean"), row.get("variance")) for row in rows] == [(5, None), (None, 5)]
    model = volcast.load(gaussian, "onnxruntime")
    arrays = np.array([one.array for one in model.sample_many(5, batch=2, steps=3)], np.float64)
    mean, variance = (np.asarray(nibabel.load(maps[i]).dataobj) for i in (1, 3))
    np.testing.assert_allclose(mean, arrays.mean(0), rtol=0, atol=6e-8 * np.abs(arrays).max())
    np.testing.assert_allclose(variance, arrays.var(0, ddof=1), rtol=1e-6)
    # With an output the volumes are written too.
    assert run(gaussian, "-n", 2, "-o", tmp_path / "one.nii.gz", *maps) == 0
    assert (tmp_path / "one_1.nii.gz").is_file() and "variance of 2" in capsys.readouterr().out


def test_maps_that_cannot_be(gaussian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (("--variance", tmp_path / "v.nii.gz"), "--variance: of 1 volume; give -n 2 or more"),
        (("-n", 2, "--mean", tmp_path / "m.nii.gz", "--guidance", "1,2"), "of one guidance weight, not of several"),
        (("-n", 2, "--mean", tmp_path / "m.png"), "need a name that ends in .nii"),
        (("-n", 2, "--mean", tmp_path / "no" / "m.nii"), "not a folder that can be written to"),
    ):  # fmt: skip
        assert run(gaussian, *more) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
