"""Sampling under a classifier's gradient, against MONAI's networks with torch's autograd in float64."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anomaly_models
import diffusers
import nibabel
import numpy as np
import pytest
import torch
from host_network import HostEngine

from volcast import Inpaint, _core
from volcast.__main__ import app
from volcast.runtime.pipeline import Model, load
from volcast.runtime.sampler import SamplerConfig, make_plan, make_schedule

CONTEXT = np.array([[0.4, -0.2, 0.7]])
GIVEN: dict[str, Any] = {"condition": {"context": CONTEXT}}
LEVELS = np.array(make_schedule(anomaly_models.SCHEDULER.noise_schedule).alphas_cumprod)
SHAPE = anomaly_models.SHAPE
Eps = Callable[[np.ndarray, int], np.ndarray]


@pytest.fixture(scope="module")
def small(shared_folder: Any) -> Path:
    return shared_folder("anomaly", anomaly_models.make)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def model(small: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(small / "classified", request.param, threads=1) as opened:
        yield opened


@functools.cache
def networks() -> tuple[Any, Any]:
    return anomaly_models.unet().double(), anomaly_models.classifier().double()


def output(x: np.ndarray, t: int, guidance: float | None) -> np.ndarray:
    network, _ = networks()
    times = torch.full((len(x),), float(t), dtype=torch.float64)

    def shown(context: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.repeat(context[None], len(x), 0)).double()
        return np.asarray(network(torch.from_numpy(x), times, given))

    out = shown(CONTEXT)
    if guidance is None:
        return out
    null = shown(np.full((1, 3), -1.0))
    return null + guidance * (out - null)


def gradient(x: np.ndarray, t: int, label: int) -> np.ndarray:
    given = torch.from_numpy(x).clone().requires_grad_(True)
    log_p = networks()[1](given, torch.full((len(x),), float(t))).log_softmax(1)[:, label].sum()
    return np.asarray(torch.autograd.grad(log_p, given)[0])


def moved(prediction: str, label: int, scale: float, guidance: float | None) -> Eps:
    """epsilon of arXiv:2105.05233 algorithm 2: what the network's output says of it, moved."""

    def call(x: np.ndarray, t: int) -> np.ndarray:
        signal, sigma = np.sqrt(LEVELS[t]), np.sqrt(1 - LEVELS[t])
        out = output(x, t, guidance)
        eps = {"epsilon": out, "sample": (x - signal * out) / sigma, "v_prediction": signal * out + sigma * x}
        return eps[prediction] - scale * sigma * gradient(x, t, label)

    return call


def noise(seed: int, samples: range) -> np.ndarray:
    seeds, numbers = np.full(len(samples), seed, np.uint64), np.array(samples, np.uint64)
    return _core.normal(seeds, numbers, 0, SHAPE, np.dtype(np.float32)).astype(np.float64)


def ddim(x: np.ndarray, steps: int, eps: Eps) -> np.ndarray:
    """Algorithm 2 by diffusers, in float64."""
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=len(LEVELS), clip_sample=True, timestep_spacing="leading"
    )
    scheduler.alphas_cumprod = torch.from_numpy(LEVELS)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = np.asarray(scheduler.step(torch.from_numpy(eps(x, int(t))), t, torch.from_numpy(x)).prev_sample)
    return x


def assert_near(found: np.ndarray, wanted: np.ndarray, steps: int) -> None:
    """Float32 networks against float64: 100 roundings a call, the output weighed by up to 50 and added to the state."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=100 * steps * 50 * 2.0**-24 * np.abs(wanted).max())


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_algorithm_2(model: Model, guidance: float | None) -> None:
    settings: Any = {**GIVEN, "steps": 6, "spacing": "leading", "guidance": guidance}
    found = [one.array for one in model.sample_many(3, 7, batch=2, label=2, scale=0.5, **settings)]
    wanted = ddim(noise(7, range(3)), 6, moved("epsilon", 2, 0.5, guidance))
    assert_near(np.stack(found)[:, None], wanted, 6)
    plain, other = (model.sample(7, **settings, **more).array for more in ({}, {"label": 1, "scale": 0.5}))
    assert np.abs(plain - found[0]).max() > 0.01 and np.abs(other - found[0]).max() > 0.01
    np.testing.assert_array_equal(model.sample(7, **settings, label=2, scale=0.0).array, plain)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_other_predictions(small: Path, tmp_path: Path, prediction: str) -> None:
    """The same networks, whose output is taken for x0 or for v: what is moved is still epsilon."""
    model = load(changed(small, tmp_path, prediction_type=prediction), "onnxruntime", threads=1)
    found = model.sample(3, **GIVEN, steps=6, spacing="leading", label=1, scale=0.5)
    assert_near(found.array[None, None], ddim(noise(3, range(1)), 6, moved(prediction, 1, 0.5, None)), 6)


@pytest.mark.parametrize("scheduler", ["ddpm", "pndm", "dpm-solver++", "inpaint"])
def test_other_plans(small: Path, scheduler: str) -> None:
    """Plans that are judged by themselves elsewhere, carried out in float64 on the moved epsilon."""
    model = load(small / "classified", "onnxruntime", threads=1)
    method: Any = "ddim" if scheduler == "inpaint" else scheduler
    plan = make_plan(model.spec.scheduler, SamplerConfig(scheduler=method, steps=6), SHAPE[1:])
    x, eps, known, more = noise(5, range(1)), moved("epsilon", 0, 0.5, None), {}, {}
    if scheduler == "inpaint":
        image, mask = np.full(SHAPE, 0.3, np.float32), np.zeros(SHAPE[1:], np.float32)
        mask[2:6, 3:9] = 1
        plan = _core.make_repaint(plan, resamples=2, jump_length=1)
        known = {"known": image.astype(np.float64), "keep": 1 - mask[None].astype(np.float64)}
        more = {"image": image, "inpaint": Inpaint(mask, resamples=2)}

    def network(step: int, x: np.ndarray, _: Any) -> np.ndarray:
        return np.ascontiguousarray(eps(x.copy(), int(plan.timesteps[step])))

    _core.run(plan, x, network, np.array([5], np.uint64), np.zeros(1, np.uint64), **known)
    found = model.sample(5, **GIVEN, scheduler=method, steps=6, label=0, scale=0.5, **more)
    assert_near(found.array[None, None], x, len(plan))


def test_by_submit_beside_others(small: Path) -> None:
    """Samples of other classes, scales and of none share the calls; each has the bits it has alone."""
    with load(small / "classified", "onnxruntime", threads=1) as model:
        asked: list[dict[str, Any]] = [
            {"label": 1, "scale": 3.0}, {"label": 2}, {}, {"label": 0, "guidance": 2.0}, {"label": 1, "steps": 4},
        ]  # fmt: skip
        alone = [model.sample(4, **{**GIVEN, "steps": 5, **one}).array for one in asked]
        futures = [model.submit(4, **{**GIVEN, "steps": 5, **one}) for one in asked]
        for future, wanted in zip(futures, alone, strict=True):
            np.testing.assert_array_equal(future.result(60).array, wanted)
        many = list(model.sample_many(2, 4, **GIVEN, steps=5, guidance=[1.5, 4.0], label=1))
        one = model.submit(4, sample=1, **GIVEN, steps=5, guidance=4.0, label=1).result(60)
        np.testing.assert_array_equal(many[3].array, one.array)


def test_on_the_command_line(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "sample",
        small / "classified",
        "-o",
        tmp_path / "x.nii.gz",
        "-c",
        "context=0.4,-0.2,0.7",
        "--steps",
        4,
    ]
    words += ["--engine", "onnxruntime", "--threads", 1]

    def run(*more: Any) -> int:
        return app([str(word) for word in [*words, *more]])

    assert run("--label", 1, "--scale", 3) == 0
    model = load(small / "classified", "onnxruntime", threads=1)
    wanted = model.sample(0, **GIVEN, steps=4, label=1, scale=3.0)
    np.testing.assert_array_equal(
        np.asarray(nibabel.load(tmp_path / "x.nii.gz").dataobj).squeeze(), wanted.array
    )
    assert run("--scale", 3) == 2
    assert "scale=3.0 without label: give label=CLASS too" in capsys.readouterr().err


def test_what_is_refused(small: Path, gaussian: Path, tmp_path: Path) -> None:
    model = load(small / "classified", "onnxruntime", threads=1)
    sample = functools.partial(model.sample, **GIVEN, label=1)
    flow = changed(small, tmp_path, prediction_type="flow", scheduler="rflow")
    for call, message in (
        (functools.partial(sample, label=3), r"label=3: need 0..2"),
        (functools.partial(sample, label=-1), r"label=-1: need 0..2"),
        (functools.partial(sample, label=True), r"label=True"),
        (functools.partial(sample, label=None, scale=1.0), r"scale=1.0 without label"),
        (functools.partial(sample, scale=-1.0), r"scale=-1.0"),
        (functools.partial(sample, scale=float("nan")), r"scale=nan"),
        (functools.partial(sample, reuse=2), r"\[classifier\] label=1: reuse=2"),
        (functools.partial(sample, size=(16, 12)), r"latent is \(1, 16, 12\): the classifier takes \(1, 8, 12\)"),
        (functools.partial(load(small / "plain", "onnxruntime").sample, **GIVEN, label=1), "small has no classifier"),
        (functools.partial(load(gaussian, HostEngine()).sample, label=1), "gaussian has no classifier"),
        (functools.partial(load(small / "classified", HostEngine()).sample, **GIVEN, label=1), "runs no gradient"),
        (
            functools.partial(load(small / "classified", "onnxruntime", 1, "64GiB").sample, **GIVEN, label=1),
            "memory_limit: a classifier's memory is not foretold",
        ),
        (functools.partial(load(flow, "onnxruntime").sample, **GIVEN, label=1), "predicts a flow"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def changed(small: Path, folder: Path, **scheduler: str) -> Path:
    """The classified artifact with another scheduler in its manifest."""
    place = folder / "changed"
    shutil.copytree(small / "classified", place)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["scheduler"] |= scheduler
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place
