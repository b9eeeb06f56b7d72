"""Anomaly maps by DDIM inversion: against diffusers with MONAI's networks in float64, and closed forms."""

from __future__ import annotations

import functools
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anomaly_models
import diffusers
import nibabel
import numpy as np
import pytest
import torch

from volcast.__main__ import app
from volcast.export.bundle import read_bundle
from volcast.runtime.default_artifact import BUNDLE
from volcast.runtime.pipeline import Model, load
from volcast.runtime.sampler import make_schedule
from volcast.runtime.spec import SchedulerSpec
from volcast.runtime.volume import Volume

AFFINE = np.array([[1.0, 0, 0, 5], [0, 1, 0, -7], [0, 0, 1, 9], [0, 0, 0, 1]])
PLANE = AFFINE @ np.diag([1, 2, 3, 1])
"""Of the 2D model's voxels."""
CONTEXT = np.array([[0.4, -0.2, 0.7]])
Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def small(shared_folder: Any) -> Path:
    return shared_folder("anomaly", anomaly_models.make)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def model(small: Path, request: pytest.FixtureRequest) -> Model:
    return load(small / "classified", request.param, threads=1)


def image(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reaches beyond the [-1, 1] to which the model clips x0."""
    return np.random.default_rng(seed).normal(0, 0.8, shape).astype(np.float32)


def theirs(scheduler: Any, spec: SchedulerSpec, steps: int) -> Any:
    """A scheduler of diffusers with volcast's betas in float64."""
    schedule = make_schedule(spec.noise_schedule)
    scheduler.betas = torch.from_numpy(np.array(schedule.betas))
    scheduler.alphas_cumprod = torch.from_numpy(np.array(schedule.alphas_cumprod))
    for name in ("final_alpha_cumprod", "initial_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, torch.tensor(1.0, dtype=torch.float64))
    scheduler.set_timesteps(steps)
    return scheduler


def there_and_back(
    spec: SchedulerSpec, steps: int, taken: int, x: torch.Tensor, out: Network, back: Network
) -> tuple[np.ndarray, np.ndarray]:
    """The `taken` cleanest of `steps` steps backwards, shown to `out`, and forwards again, shown to `back`."""
    common = {
        "num_train_timesteps": spec.noise_schedule.num_train_timesteps,
        "timestep_spacing": "leading",
        "prediction_type": spec.prediction_type,
    }
    with torch.no_grad():
        inverse = theirs(diffusers.DDIMInverseScheduler(clip_sample=False, **common), spec, steps)
        for t in inverse.timesteps[:taken]:
            x = inverse.step(out(x, t), t, x).prev_sample
        latent = x.numpy()
        forward = diffusers.DDIMScheduler(clip_sample=spec.clip_sample, set_alpha_to_one=True, **common)
        for t in theirs(forward, spec, steps).timesteps[steps - taken :]:
            x = forward.step(back(x, t), t, x).prev_sample
    return latent, x.numpy()


def shown(network: Any, context: np.ndarray) -> Network:
    network, given = network.double(), torch.from_numpy(context)[None].double()

    def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = network(x, torch.full((1,), float(t), dtype=torch.float64), given)
        return result

    return call


def guided(conditional: Network, null: Network, weight: float) -> Network:
    return lambda x, t: null(x, t) + weight * (conditional(x, t) - null(x, t))


def assert_near(found: np.ndarray, wanted: np.ndarray, roundings: float) -> None:
    """Float32 networks against float64: so many roundings of the largest value of an update."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=roundings * 2.0**-24 * np.abs(wanted).max())


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("observed", [None, CONTEXT[:, ::-1].copy()], ids=["null", "observed"])
def test_against_diffusers_with_monai_s_network(
    model: Model, observed: np.ndarray | None, guidance: float | None
) -> None:
    network = anomaly_models.unet()
    null, healthy = shown(network, np.full((1, 3), -1.0)), shown(network, CONTEXT)
    back = healthy if guidance is None else guided(healthy, null, guidance)
    out = null if observed is None else shown(network, observed)
    x = image(0, anomaly_models.SHAPE)
    scheduler, given = anomaly_models.SCHEDULER, torch.from_numpy(x)[None].double()
    latent, wanted = there_and_back(scheduler, 8, 5, given, out, back)

    found = model.anomaly(
        x, condition={"context": CONTEXT}, observed=None if observed is None else {"context": observed},
        guidance=guidance, strength=0.65, spacing="leading",
    )  # fmt: skip
    assert found.steps == 5
    # Some 100 roundings a call, each step's output weighed by up to 3 (guidance: 7) and added to the state.
    assert_near(found.latent, latent, 100 * 5 * 3)
    assert_near(found.reconstruction.array[None, None], wanted, 100 * 10 * 7)
    np.testing.assert_array_equal(found.map.array, np.abs(x[0] - found.reconstruction.array))
    # The condition, guidance and the way out all matter here.
    other = model.anomaly(
        x, condition={"context": -CONTEXT}, guidance=guidance, strength=0.65, spacing="leading"
    )
    assert np.abs(other.reconstruction.array - found.reconstruction.array).max() > 0.01


def test_a_classifier_moves_epsilon(model: Model) -> None:
    """arXiv:2203.04306 algorithm 1: eps - s sqrt(1 - alpha_bar) grad log p(y | x_t), by torch's autograd in float64."""
    network, classifier = anomaly_models.unet(), anomaly_models.classifier().double()
    levels = torch.from_numpy(np.array(make_schedule(anomaly_models.SCHEDULER.noise_schedule).alphas_cumprod))
    null, healthy = shown(network, np.full((1, 3), -1.0)), shown(network, CONTEXT)

    def moved(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            log_p = classifier(x, torch.full((1,), float(t))).log_softmax(1)[0, 2]
            (gradient,) = torch.autograd.grad(log_p, x)
        return guided(healthy, null, 2.0)(x.detach(), t) - 0.5 * (1 - levels[t]).sqrt() * gradient

    x = image(1, anomaly_models.SHAPE)
    _, wanted = there_and_back(
        anomaly_models.SCHEDULER, 8, 4, torch.from_numpy(x)[None].double(), null, moved
    )
    settings: Any = {"condition": {"context": CONTEXT}, "guidance": 2.0, "spacing": "leading"}
    found = model.anomaly(x, label=2, scale=0.5, **settings)
    # As above; the gradient comes through two networks' worth of roundings and is some 10 in size.
    assert_near(found.reconstruction.array[None, None], wanted, 100 * 8 * 50)
    without = model.anomaly(x, **settings)
    assert np.abs(without.reconstruction.array - found.reconstruction.array).max() > 0.01


def test_a_latent_model_in_3d_against_monai(default_artifact_folder: Path) -> None:
    bundle = read_bundle(BUNDLE)
    assert bundle.autoencoder is not None
    model = load(default_artifact_folder, "openvino")
    x = np.random.default_rng(2).uniform(0, 1, (16, 16, 16)).astype(np.float32)
    autoencoder = bundle.autoencoder.double()
    given = torch.from_numpy(x)[None, None].double()
    context = np.array([[0.3, 0.6, 0.4]])
    with torch.no_grad():
        z = autoencoder.encode(given)[0] * bundle.scale_factor
        latent, back = there_and_back(
            bundle.scheduler, 4, 2, z, shown(bundle.unet, np.full((1, 3), -1.0)), shown(bundle.unet, context)
        )
        wanted = autoencoder.decode_stage_2_outputs(torch.from_numpy(back) / bundle.scale_factor).numpy()
    found = model.anomaly(
        Volume(x, AFFINE, (1.0, 1.0, 1.0)), condition={"context": context}, steps=4, spacing="leading"
    )
    # A deeper network, 200 roundings a call; the decoder's are some 100 more.
    assert_near(found.latent, latent, 200 * 2 * 3)
    assert_near(found.reconstruction.array[None, None], wanted, 200 * 5 * 3)
    assert (found.map.affine == AFFINE).all() and found.map.spacing_mm == (1.0, 1.0, 1.0)


def test_gaussian_data_in_closed_form(gaussian: Path) -> None:
    """The flow of N(m, 0.5^2) data is linear: x_t = sqrt(a) m + sqrt(0.25 a + 1 - a) (x0 - m) / 0.5."""
    model = load(gaussian, "onnxruntime", threads=1)
    x = np.random.default_rng(3).normal(0.6, 1.0, (8, 12, 8)).astype(np.float32)
    z = model.encode(x)
    unwell, well = {"anterior": 0.5, "ratio": 0.1}, {"anterior": 0.5, "ratio": 0.02}
    sick, healthy = 0.5 - 0.25 + 1.0, 0.5 - 0.25 + 0.2
    found = model.anomaly(x, condition=well, observed=unwell, steps=1000)
    level = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[499]
    spread = np.sqrt(0.25 * level + 1 - level) / 0.5
    # Euler's error of a flow over 500 of its steps is of the order of a step's part of the way, 1 / 500.
    np.testing.assert_allclose(found.latent, np.sqrt(level) * sick + spread * (z - sick), atol=0.02)
    # Back under another mean: the flow of the other data, from the same noise.
    gone = healthy + (np.sqrt(level) * (sick - healthy) + spread * (z - sick)) / spread
    image = gone.mean(1)[0].repeat(2, 0).repeat(2, 1).repeat(2, 2) / 0.5
    np.testing.assert_allclose(found.reconstruction.array, image, atol=0.06)
    same = model.anomaly(x, condition=unwell, observed=unwell, steps=1000)
    decoded = model.decode(z)[0, 0]
    np.testing.assert_allclose(same.reconstruction.array, decoded, atol=0.06)


def test_the_example(
    default_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(default_cache))
    monkeypatch.setattr("sys.argv", ["anomaly.py", str(tmp_path / "made"), "--steps", "4"])
    script = Path(__file__).parent.parent / "docs" / "examples" / "anomaly.py"
    runpy.run_path(str(script), run_name="__main__")
    inside, outside = re.findall(r"0\.\d+", capsys.readouterr().out.splitlines()[0])
    assert float(inside) > 2 * float(outside)
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"anomaly.nii.gz", "anomaly.png"}


def run(*words: object) -> int:
    return app([str(word) for word in words])


def test_on_the_command_line(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = image(4, (8, 12, 1))
    nibabel.save(nibabel.Nifti1Image(x, PLANE), tmp_path / "x.nii.gz")
    given = (
        small / "classified",
        tmp_path / "x.nii.gz",
        "-c",
        "context=0.4,-0.2,0.7",
        "--engine",
        "onnxruntime",
    )
    out = ("-o", tmp_path / "map.nii.gz", "--reconstruction", tmp_path / "back.nii.gz")
    assert run("anomaly", *given, *out, "--guidance", 2, "--label", 1, "--scale", 3, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    found, back = (nibabel.load(tmp_path / f"{name}.nii.gz") for name in ("map", "back"))
    array = np.asarray(found.dataobj)
    assert array.shape == (8, 12, 1) and (found.affine == PLANE).all() and (back.affine == PLANE).all()
    np.testing.assert_array_equal(array, np.abs(x - np.asarray(back.dataobj, np.float32)))
    assert told["steps"] == 4 and told["max"] == pytest.approx(float(array.max()))
    model = load(small / "classified", "onnxruntime")
    same = model.anomaly(x[..., 0], condition={"context": CONTEXT}, guidance=2.0, label=1, scale=3.0)
    np.testing.assert_array_equal(array[..., 0], same.map.array)
    assert run("anomaly", *given, *out, "--steps", 6, "--strength", 1, "--observed", "context=0,0,0") == 0
    assert "6 steps each way" in capsys.readouterr().out

    nibabel.save(nibabel.Nifti1Image(x[:5], PLANE), tmp_path / "odd.nii.gz")
    nibabel.save(nibabel.Nifti1Image(x.repeat(2, 2), PLANE), tmp_path / "deep.nii.gz")
    nibabel.save(nibabel.Nifti1Image(x * np.nan, PLANE), tmp_path / "nan.nii.gz")
    for words, message in (
        ((*given, "--label", 3), "label=3: need 0..2"),
        ((*given, "--label", 1, "--scale", "nan"), "scale=nan"),
        ((*given, "--scale", 3), "scale=3.0 without label"),
        ((*given, "--strength", 0), "strength=0"),
        ((*given, "-o", tmp_path / "map.png"), "ends in .nii"),
        ((small / "plain", *given[1:], "--label", 1), "small has no classifier"),
        ((given[0], tmp_path / "none.nii.gz", *given[2:]), "none.nii.gz"),
        ((given[0], tmp_path / "odd.nii.gz", *given[2:]), "d0=5"),
        (
            (given[0], tmp_path / "deep.nii.gz", *given[2:]),
            "the image is float32 (8, 12, 2): need numbers, (1, D, H)",
        ),
        ((given[0], tmp_path / "nan.nii.gz", *given[2:]), "NaN"),
        ((*given, "--engine", "cuda"), "cuda"),
    ):
        assert run("anomaly", *words) == 2
        assert message in capsys.readouterr().err, message


def test_what_is_refused(model: Model, gaussian: Path, small: Path) -> None:
    x = image(5, anomaly_models.SHAPE)
    for call, message in (
        (functools.partial(model.anomaly, x), "context is missing"),
        (functools.partial(model.anomaly, x, condition={"context": CONTEXT}, eta=1.0), "unknown eta"),  # type: ignore[call-arg]
        (functools.partial(model.anomaly, x, condition={"context": CONTEXT}, steps=41), "steps=41"),
        (
            functools.partial(
                load(small / "classified", "onnxruntime", 1, "64GiB").anomaly,
                x,
                condition={"context": CONTEXT},
                label=0,
            ),
            "memory_limit: a classifier's",
        ),
        (functools.partial(load(gaussian, "onnxruntime").anomaly, x), "o0=1: need 4"),
        (
            functools.partial(model.anomaly, x, condition={"context": CONTEXT}, observed={"c": 0}),
            "unknown name 'c'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
