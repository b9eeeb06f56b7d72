"""Likelihoods of diffusion models: against MONAI's inferers, and the density of Gaussian data in closed form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anomaly_models
import nibabel
import numpy as np
import pytest
import torch
from monai.inferers import DiffusionInferer, LatentDiffusionInferer
from monai.networks.schedulers import DDPMScheduler
from scipy.stats import norm

from volcast.__main__ import app
from volcast.runtime.diffusion_likelihood import BIN, NOISE_STEP, Bound, likelihood_terms
from volcast.runtime.noise import request_noise
from volcast.runtime.pipeline import Model, load
from volcast.runtime.programs import Programs
from volcast.runtime.sampler import make_schedule
from volcast.runtime.spec import SchedulerSpec

AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])
CONTEXT = np.array([[0.4, -0.2, 0.7]])


@pytest.fixture(scope="module")
def small(shared_folder: Any) -> Path:
    return shared_folder("anomaly", anomaly_models.make)


@pytest.fixture(scope="module")
def model(small: Path) -> Model:
    return load(small / "plain", "onnxruntime", threads=1)


def ddpm(spec: SchedulerSpec, steps: int) -> DDPMScheduler:
    """MONAI's, with volcast's betas in float64."""
    scheduler = DDPMScheduler(
        num_train_timesteps=spec.noise_schedule.num_train_timesteps, prediction_type=spec.prediction_type,
        variance_type=spec.variance_type, clip_sample=spec.clip_sample,
    )  # fmt: skip
    schedule = make_schedule(spec.noise_schedule)
    scheduler.betas = torch.from_numpy(np.array(schedule.betas))
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.from_numpy(np.array(schedule.alphas_cumprod))
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    return scheduler


def monais(x: np.ndarray, steps: int, noise: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Every term of MONAI's sum, float64 `[steps, C, H, W]`, with this noise."""
    network, given = anomaly_models.unet().double(), torch.from_numpy(CONTEXT)[None]

    def call(x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = network(x, timesteps.double(), context)
        return result

    monkeypatch.setattr(torch, "randn_like", lambda _: torch.from_numpy(noise).double())
    inferer = DiffusionInferer(ddpm(anomaly_models.SCHEDULER, steps))
    total, terms = inferer.get_likelihood(
        torch.from_numpy(x)[None].double(), call, conditioning=given, save_intermediates=True, verbose=False
    )
    found = torch.cat(terms).numpy()
    assert total.item() == pytest.approx(found.mean((1, 2, 3)).sum(), rel=1e-5)
    return found


@pytest.mark.parametrize("steps", [40, 7])
def test_the_terms_are_monais(small: Path, model: Model, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    x = np.random.default_rng(0).normal(0, 0.8, anomaly_models.SHAPE).astype(np.float32)
    noise = request_noise(5, range(1), NOISE_STEP, anomaly_models.SHAPE)
    wanted = monais(x, steps, noise, monkeypatch)
    programs = Programs(small / "plain", model.spec, model.engine)
    how: Any = {"seed": 5, "condition": {"context": CONTEXT}, "steps": steps}
    found = likelihood_terms(model.spec, programs, x[None], None, how | {"compat": "monai-1.6"})
    # A term is a square of x0 - x0': some 100 roundings of a network's output, divided by sqrt(alpha_bar) for x0' and by
    # the posterior's deviation. Twice the difference is the square's slope.
    levels = np.array(make_schedule(model.spec.scheduler.noise_schedule).alphas_cumprod)
    scale = np.sqrt(np.abs(wanted[:-1]).max((1, 2, 3), keepdims=True) + 1)
    off = np.abs(found[:-1] - wanted[:-1]) / scale
    assert off.max() < 100 * 2.0**-24 * 2 / np.sqrt(levels[-1] * levels[0] * (1 - levels[0]))
    # The last term is a step of the size of a bin: off by a rounding at its edge, 27.6 beyond.
    assert np.mean(np.abs(found[-1] - wanted[-1]) < 1e-3) > 0.98
    assert {0.0, 27.6} >= set(np.abs(wanted[-1]).round(1).ravel()) and found[-1].max() == pytest.approx(
        27.631, abs=1e-3
    )
    summed = model.likelihood(x, **(how | {"compat": "monai-1.6"}))
    np.testing.assert_array_equal(summed, -found.sum(0)[None])
    # The clean definition differs in the last term's variance, and with fewer steps in what a step is.
    clean = likelihood_terms(model.spec, programs, x[None], None, how)
    if steps == 40:
        np.testing.assert_array_equal(clean[:-1], found[:-1])
    else:
        assert np.abs(clean[:-1] - found[:-1]).max() > 1
    assert 0 < clean[-1].max() and np.abs(clean[-1] - found[-1]).max() > 1


def test_a_latent_model_s_are_those_of_its_latent(gaussian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI's LatentDiffusionInferer around the fixture's own closed forms as networks."""
    model = load(gaussian, "onnxruntime", threads=1)
    x = np.random.default_rng(1).normal(0.6, 0.3, (8, 12, 8)).astype(np.float32)
    z = model.encode(x)
    levels = torch.from_numpy(np.array(make_schedule(model.spec.scheduler.noise_schedule).alphas_cumprod))
    mean = 0.5 - 0.25 + 10 * 0.05

    class Encoder(torch.nn.Module):
        def encode_stage_2_inputs(self, given: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(z).double() / model.spec.scale_factor

    def network(x: torch.Tensor, timesteps: torch.Tensor, context: Any) -> torch.Tensor:
        a = levels[timesteps.long()].reshape(-1, 1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (0.25 * a + 1 - a)

    noise = request_noise(9, range(1), NOISE_STEP, z.shape[1:])
    monkeypatch.setattr(torch, "randn_like", lambda _: torch.from_numpy(noise).double())
    inferer = LatentDiffusionInferer(ddpm(model.spec.scheduler, 1000), scale_factor=model.spec.scale_factor)
    _, terms = inferer.get_likelihood(
        torch.from_numpy(x)[None, None].double(), Encoder(), network, save_intermediates=True, verbose=False  # type: ignore[arg-type]
    )  # fmt: skip
    how: Any = {"seed": 9, "condition": {"ratio": 0.05}, "steps": 1000, "compat": "monai-1.6"}
    found = likelihood_terms(model.spec, Programs(gaussian, model.spec, model.engine), z, None, how)
    # d term / d epsilon is sqrt(2 term beta_t / (1 - alpha_bar_{t-1})), the root at most 1.2 here; epsilon has 3 roundings
    # of parts below 8, and that of x.
    wanted = torch.cat(terms).numpy()
    off = np.abs(found[:-1] - wanted[:-1])
    assert (off <= 1.2 * np.sqrt(2 * wanted[:-1]) * 4 * 8 * 2.0**-24 + 1e-9).all() and wanted[:-1].max() > 1
    np.testing.assert_array_equal(model.likelihood(x, **how), -found.sum(0)[None])


def test_the_bound_is_the_density_of_gaussian_data(gaussian: Path) -> None:
    """With the exact denoiser and all steps the bound is nearly tight: -log p of a bin of N(m, 0.5^2) data."""
    model = load(gaussian, "onnxruntime", threads=1)
    mean = 0.5 - 0.25 + 10 * 0.05
    generator = np.random.default_rng(2)
    for shift in (0.0, 1.5):
        # `encode` averages 2^3 voxels and halves: these latents have a deviation of 0.5 around mean + shift.
        latents = generator.normal(mean + shift, 0.5, (16, 16, 16)).astype(np.float32)
        x = (latents / 0.5).repeat(2, 0).repeat(2, 1).repeat(2, 2)
        z = model.encode(x)
        found = -model.likelihood(x, seed=3, condition={"ratio": 0.05}, steps=1000)
        wanted = -norm.logpdf(z, mean, 0.5) - np.log(BIN)
        # The noise of each value is its own but for the two equal channels: the standard error of 4096 pairs.
        error = found.std() / np.sqrt(found.size / 2)
        # The bound's first term, left out as in MONAI, is alpha_bar z^2 / 2 at the end: below 1e-4. What a step of the
        # model cannot say is of the order of 1 / steps a nat each way; the last term's variance is that of the step before.
        assert abs(found.mean() - wanted.mean()) < 5 * error + 0.05, (
            shift,
            found.mean(),
            wanted.mean(),
            error,
        )


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_every_prediction_says_the_same_x0(prediction: Any) -> None:
    generator = np.random.default_rng(3)
    clean, noise, guess = generator.normal(0, 1, (3, 50))
    timesteps = np.array([900, 400, 10, 0])
    bounds = {name: Bound(SchedulerSpec(prediction_type=name), timesteps, monai=False)
              for name in ("epsilon", prediction)}  # fmt: skip
    for place in range(4):
        signal, sigma = bounds["epsilon"].levels(place)
        noisy = signal * clean + sigma * noise
        eps = (noisy - signal * guess) / sigma
        out = {"epsilon": eps, "sample": guess, "v_prediction": signal * eps - sigma * guess}
        terms = [bound.term(place, clean, noisy, out[name]) for name, bound in bounds.items()]
        np.testing.assert_allclose(
            terms[0], terms[1], rtol=1e-6, atol=1e-9
        )  # eps is divided by signal, 0.016 at least


def run(*words: object) -> int:
    return app([str(word) for word in words])


def test_folders_against_each_other(
    gaussian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(4)
    for folder, deviation in (("known", 0.5), ("unlike", 2.0)):
        (tmp_path / folder).mkdir()
        for number in range(4):
            x = 1.5 + generator.normal(0, deviation, (8, 12, 8)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(x, AFFINE), tmp_path / folder / f"{number}.nii.gz")
    given = ("-c", "ratio=0.05", "--steps", 20, "--engine", "onnxruntime")
    assert (
        run("likelihood", gaussian, tmp_path / "known", "--against", tmp_path / "unlike", *given, "--json")
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["auc"] == 1 and told["auc_interval"] == [1, 1] and len(told["images"]) == 8
    path = tmp_path / "known" / "2.nii.gz"
    model = load(gaussian, "onnxruntime")
    values = model.likelihood(np.asarray(nibabel.load(path).dataobj), condition={"ratio": 0.05}, steps=20)
    assert told["images"][2] == {
        "path": str(path), "log_likelihood": float(values.sum()), "nats_per_value": float(-values.mean())
    }  # fmt: skip
    assert run("likelihood", gaussian, path, "-o", tmp_path / "map.nii.gz", *given) == 0
    assert f"{-values.mean():.4f} nats a value" in capsys.readouterr().out
    found = nibabel.load(tmp_path / "map.nii.gz")
    array = np.asarray(found.dataobj)
    assert array.shape == (8, 12, 8) and (found.affine == AFFINE).all()
    np.testing.assert_allclose(array[::2, ::2, ::2], values[0].sum(0) / 8, rtol=2.0**-23)
    assert array.sum(dtype=np.float64) == pytest.approx(values.sum(), rel=2.0**-22)
    np.testing.assert_array_equal(array[1::2, 1::2, 1::2], array[::2, ::2, ::2])
    assert run("likelihood", gaussian, path, tmp_path / "unlike", "--seed", 1, *given) == 0
    assert "AUC" not in capsys.readouterr().out

    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 12, 6), np.float32), AFFINE), tmp_path / "odd.nii.gz")
    for words, message in (
        ((path, "--steps", 0), "steps=0"),
        ((path, "--seed", -1), "seed"),
        ((path, "--against", tmp_path / "unlike", "-o", tmp_path / "a.nii.gz"), "give one, not 5"),
        ((path, "-o", path), "2.nii.gz is read, and would be replaced"),
        ((path, "--against", path), "1 images and 1: need 2 or more"),
        ((path, tmp_path / "odd.nii.gz"), "odd.nii.gz: [encode] o2=6"),
        ((path, "--engine", "cuda"), "cuda"),
    ):
        assert run("likelihood", gaussian, *words) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("[likelihood]") <= 1, err


def test_what_has_no_bound(model: Model) -> None:
    x = np.zeros(anomaly_models.SHAPE)
    with pytest.raises(ValueError, match="unknown eta"):
        model.likelihood(x, condition={"context": CONTEXT}, eta=0.5)  # type: ignore[call-arg]
    flow = model.spec.model_copy(
        update={"scheduler": SchedulerSpec(scheduler="rflow", prediction_type="flow")}
    )
    with pytest.raises(ValueError, match="flow"):
        likelihood_terms(flow, Programs(Path(), flow, model.engine), x[None].astype(np.float32), None, {})
