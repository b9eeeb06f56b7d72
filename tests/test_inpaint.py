"""Inpainting through the model: what stays is the image's, what is painted follows the paper's loop in float64."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from conftest import STEPS, VARIANCE, alpha_bar
from host_network import HostEngine

import volcast
from volcast import Inpaint, Volume, _core
from volcast.runtime.inpaint import make_known
from volcast.runtime.volume import centred_affine, read_nifti

SHAPE = (8, 12, 8)
"""Of the gaussian model's images; its latent is 4 x 6 x 4."""
rng = np.random.default_rng(0)
SCAN = rng.normal(1.0, 0.3, SHAPE).astype(np.float32)
MASK = np.zeros(SHAPE, np.float32)
MASK[2:5, 4:8, 1:6] = 1
SETTINGS = {"steps": 12, "scheduler": "ddpm", "condition": {"anterior": 0.9, "posterior": 0.2, "ratio": 0.05}}


@pytest.fixture(scope="module")
def model(gaussian):
    with volcast.load(gaussian, "onnxruntime", threads=1) as opened:
        yield opened


def placed(array, shift=0.0):
    affine = centred_affine(array.shape, (1.0, 1.5, 2.0))
    affine[0, 3] += shift
    return Volume(array.astype(np.float32), affine, (1.0, 1.5, 2.0))


def papers_loop(seed: int, x0: np.ndarray, keep: np.ndarray, mean: float, resamples: int) -> np.ndarray:
    """Algorithm 1 of arXiv:2201.09865 with the data's exact denoiser, DDPM's ancestral steps, jumps of one step."""
    grid = np.round(np.linspace(STEPS - 1, 0, 12)).astype(int)
    bar = alpha_bar()[grid]
    seeds, samples, shape = np.array([seed], np.uint64), np.zeros(1, np.uint64), x0.shape

    def normal(step, which=0):
        return _core.normal(seeds, samples, step | which, shape, np.dtype("float64"))[0]

    x, row = normal(0), 0
    for i, a in enumerate(bar):
        before = bar[i + 1] if i + 1 < len(bar) else 1.0
        for turn in range(resamples if i + 1 < len(bar) else 1):
            row += 1
            beta = 1 - a / before
            eps = np.sqrt(1 - a) * (x - np.sqrt(a) * mean) / (VARIANCE * a + 1 - a)
            unknown = (x - beta / np.sqrt(1 - a) * eps) / np.sqrt(1 - beta)
            if before < 1:
                unknown = unknown + np.sqrt((1 - before) / (1 - a) * beta) * normal(row)
            known = np.sqrt(before) * x0 + np.sqrt(1 - before) * normal(row, _core.KNOWN_NOISE)
            x = keep * known + (1 - keep) * unknown
            if turn + 1 < resamples and before < 1:
                x = np.sqrt(1 - beta) * x + np.sqrt(beta) * normal(row, _core.AGAIN_NOISE)
    return x


@pytest.mark.parametrize("how", ["sample", "submit"])
def test_the_papers_loop(model, how):
    inpaint = Inpaint(MASK, resamples=3, paste=False)
    arguments = {"image": SCAN, "inpaint": inpaint} | SETTINGS
    volume = model.sample(5, **arguments) if how == "sample" else model.submit(5, **arguments).result()
    x0 = model.encode(SCAN)[0].astype(np.float64)
    # A latent voxel is painted anew where any of its 2 x 2 x 2 image voxels is.
    hidden = np.add.reduceat(np.add.reduceat(np.add.reduceat(MASK, range(0, 8, 2), 0), range(0, 12, 2), 1),
                             range(0, 8, 2), 2) > 0  # fmt: skip
    mean = 0.9 - 0.2 + 10 * 0.05
    z = papers_loop(5, x0, (1.0 - hidden) * np.ones(x0.shape), mean, 3)
    wanted = np.kron(z.mean(0) / model.spec.scale_factor, np.ones((2, 2, 2)))
    # float32 states: 34 rows, each rounding x and the network's output (up to 1 / sqrt(alpha_bar[T-1]) = 160 times x).
    np.testing.assert_allclose(volume.array, wanted, rtol=0, atol=34 * 160 * 6e-8 * np.abs(wanted).max())
    keeps = np.kron(~hidden, np.ones((2, 2, 2), bool))
    coded = np.kron(x0.mean(0) / model.spec.scale_factor, np.ones((2, 2, 2)))
    np.testing.assert_allclose(volume.array[keeps], coded[keeps], rtol=1e-6)
    assert np.abs(volume.array - coded)[~keeps].min() > 1e-4


def test_a_sample_is_the_same_in_any_batch_and_by_submit(model):
    arguments = {
        "image": placed(SCAN),
        "inpaint": Inpaint(placed(MASK), resamples=2, jump_length=3),
    } | SETTINGS
    many = list(model.sample_many(3, 5, batch=2, **arguments))
    alone = model.submit(5, sample=2, **arguments).result()
    np.testing.assert_array_equal(many[2].array, alone.array)
    for one in many:
        np.testing.assert_array_equal(one.array[MASK == 0], SCAN[MASK == 0])
        np.testing.assert_array_equal(one.affine, placed(SCAN).affine)
    assert np.abs(many[0].array - many[1].array)[MASK != 0].min() > 0
    assert many[0].report.steps > SETTINGS["steps"]


def test_tensorrts_loop(model, gaussian):
    """Its captured step has no part that stays: the plan runs on the host, with the bits of the other engines."""
    arguments = {"image": SCAN, "inpaint": Inpaint(MASK, resamples=2)} | SETTINGS
    with volcast.load(gaussian, HostEngine()) as other:
        np.testing.assert_array_equal(other.sample(5, **arguments).array, model.sample(5, **arguments).array)


def test_previews_and_guidance_and_strength(model):
    seen, arguments = [], {"image": SCAN, "inpaint": Inpaint(MASK, resamples=1)} | SETTINGS
    guided = model.sample(1, guidance=2.0, on_preview=lambda step, images: seen.append(images.copy()),
                          preview_every=6, **arguments)  # fmt: skip
    assert len(seen) == 2 and guided.report.steps == 12
    np.testing.assert_array_equal(seen[0][0, 0][MASK == 0], SCAN[MASK == 0])
    # With a small strength the part that is painted begins near the image, and stays nearer to it.
    far, near = (model.sample(1, strength=s, **arguments).array for s in (1.0, 0.1))
    assert np.abs(near - SCAN)[MASK != 0].mean() < np.abs(far - SCAN)[MASK != 0].mean() / 2


def test_masks():
    z = np.zeros((2, 4, 6, 4), np.float32)
    known = make_known(SCAN, Inpaint(MASK), z)
    assert known.keep.shape == z.shape and known.keep.sum() == 2 * (96 - 2 * 2 * 3)
    images = np.zeros((2, 1, *SHAPE), np.float32)
    np.testing.assert_array_equal(known.pasted(images)[1, 0], np.where(MASK, 0, SCAN))
    nan = MASK.copy()
    nan[0, 0, 0] = np.nan
    for mask, message in (
        (MASK[:-1], r"the mask is float32 \(7, 12, 8\): need numbers of the image's shape \(8, 12, 8\)"),
        (MASK * 0, r"the mask is 0 everywhere"),
        (nan, r"holds NaN"),
        (MASK * 0 + 1, r"no voxel of the latent \(4, 6, 4\) lies wholly outside the mask"),
        (np.array(["a"]), r"need numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            make_known(SCAN, Inpaint(mask), z)
    with pytest.raises(ValueError, match=r"does not divide the image \(8, 12, 8\)"):
        make_known(SCAN, Inpaint(MASK), z[:, :3])
    with pytest.raises(ValueError, match=r"lies elsewhere than the image \(affine\)"):
        make_known(placed(SCAN), Inpaint(placed(MASK, 1.0)), z)


def test_refusals(model):
    with pytest.raises(ValueError, match=r"inpaint without an image"):
        model.sample(inpaint=Inpaint(MASK))
    with pytest.raises(ValueError, match=r"reuse=2 with inpaint, whose steps jump back"):
        model.sample(image=SCAN, inpaint=Inpaint(MASK), reuse=2)
    with pytest.raises(ValueError, match=r"\[repaint\] pndm remembers"):
        model.sample(image=SCAN, inpaint=Inpaint(MASK), scheduler="pndm")
    with pytest.raises(ValueError, match=r"resamples=0: need 1..1000"):
        model.sample(image=SCAN, inpaint=Inpaint(MASK, resamples=0))
    with pytest.raises(
        ValueError, match=r"inpaint resamples=11: 11000 steps in all: need 10000 or fewer; take fewer"
    ):
        model.sample(image=SCAN, inpaint=Inpaint(MASK, resamples=11), steps=1000, scheduler="ddpm")
    with pytest.raises(ValueError, match="jumps back 20 of 20 steps: need fewer"):
        model.sample(image=SCAN, inpaint=Inpaint(MASK, jump_length=20))


def test_the_example(default_cache, tmp_path, monkeypatch):
    """docs/examples/inpaint.py; its mean is the ensemble's, the image's own voxels where nothing is hidden."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(default_cache))
    monkeypatch.setattr("sys.argv", ["inpaint.py", str(tmp_path / "made"), "--steps", "2"])
    script = Path(__file__).parent.parent / "docs" / "examples" / "inpaint.py"
    runpy.run_path(str(script), run_name="__main__")
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        "mean.nii.gz",
        "std.nii.gz",
        "inpaint.png",
    }
    spread = read_nifti(tmp_path / "made" / "std.nii.gz").array
    hidden = np.zeros(spread.shape, bool)
    hidden[8:24, 16:32, 8:24] = True
    assert (spread[~hidden] == 0).all() and (spread[hidden] > 0).all()
