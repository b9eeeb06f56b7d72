"""Negative conditions and guidance sweeps, against the closed form of the Gaussian denoiser (see conftest).

Its output is linear in the mean m of the data, so guidance u + w (c - u) is the denoiser of mean m_u + w (m_c - m_u).
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from os import environ
from pathlib import Path

import nibabel
import numpy as np
import pytest
from test_pipeline import HALF_ULP, STEPS, ddim, noise, upsampled

from volcast.__main__ import app
from volcast.runtime.pipeline import Model, load
from volcast.runtime.programs import Programs

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "guidance_sweep.py"
GIVEN = {"anterior": 1.0, "posterior": 0.5, "ratio": 0.1}
NEGATIVE = {"anterior": 0.25, "posterior": 0.5, "ratio": 0.0}


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def model(request: pytest.FixtureRequest, gaussian: Path) -> Model:
    pytest.importorskip(request.param)
    return load(gaussian, engine=request.param, threads=1)


def mean(condition: Mapping[str, float]) -> float:
    return condition["anterior"] - condition["posterior"] + 10 * condition["ratio"]


def check(array: np.ndarray, seed: int, sample: int, weight: float, other: float, steps: int = 5) -> None:
    timesteps = np.rint(np.linspace(STEPS - 1, 0, steps))
    guided = other + weight * (mean(GIVEN) - other)
    x, bound = ddim(noise(seed, sample).astype(np.float64), guided, timesteps)
    _, own = ddim(np.zeros_like(x), other, timesteps)
    # Both branches round as one does alone, times |1 - w| and |w|; the guided value rounds once more.
    bound = (bound + own) * (abs(1 - weight) + weight + 1)
    tolerance = upsampled(bound) + 4 * HALF_ULP * np.abs(upsampled(np.abs(x)))
    assert (np.abs(array - upsampled(x)) <= tolerance).all() and tolerance.max() < 2e-2


def test_a_negative_condition_takes_the_unconditional_s_place(model: Model) -> None:
    given = {"seed": 3, "steps": 5, "condition": GIVEN, "guidance": 2.5}
    check(model.sample(**given, negative=NEGATIVE).array, 3, 0, 2.5, mean(NEGATIVE))
    check(model.sample(**given).array, 3, 0, 2.5, -1.0 + 1.0 - 10.0)
    whole = {"context": np.array([[0.25, 0.5, 0.0]])}
    same = model.sample(**given, negative=whole).array
    np.testing.assert_array_equal(same, model.sample(**given, negative=NEGATIVE).array)
    with model:
        submitted = model.submit(**given, negative=NEGATIVE).result().array
    np.testing.assert_array_equal(submitted, same)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_sweep_is_a_volume_for_each_weight_at_the_same_noise(gaussian: Path, batch: int) -> None:
    model = load(gaussian, engine="onnxruntime", threads=1)
    weights = [0, 1, 2, 4, 7.5]
    common = {"steps": 5, "condition": GIVEN, "negative": NEGATIVE}
    volumes = list(model.sample_many(2, 9, guidance=weights, batch=batch, **common))
    assert len(volumes) == 10
    for number, volume in enumerate(volumes):
        sample, weight = number // 5, weights[number % 5]
        check(volume.array, 9, sample, weight, mean(NEGATIVE))
        alone = list(model.sample_many(2, 9, guidance=weight, **common))[sample]
        # The C++ loop and the sweep's own sum are the same float64 arithmetic, rounded once.
        np.testing.assert_array_equal(volume.array, alone.array)


def test_a_sweep_prepares_once_and_opens_each_program_once(
    gaussian: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    opened: list[str] = []
    call, open_alone = Programs.call, Programs.open_alone
    monkeypatch.setattr(
        Programs, "call", lambda self, name, given: (calls.append(name), call(self, name, given))[1]
    )
    monkeypatch.setattr(
        Programs, "open_alone", lambda self, program, sizes: (opened.append(program.file), open_alone(self, program, sizes))[1]
    )  # fmt: skip
    model = load(gaussian, engine="onnxruntime", threads=1)
    list(model.sample_many(1, guidance=range(1, 11), condition=GIVEN, steps=2))
    assert calls.count("prepare") == 2 and calls.count("decode") == 10
    assert sorted(opened) == ["decode.onnx", "prepare.onnx", "schedule.onnx", "step.onnx"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": []}, r"guidance: 0 weights: need 1\.\.1000"),
        ({"guidance": [1, -1]}, "guidance=-1"),
        ({"guidance": [1, float("nan")]}, "guidance=nan"),
        ({"guidance": [1, None]}, "None among the weights"),
        ({"guidance": "7"}, None),
        ({"negative": NEGATIVE}, r"negative without guidance: give guidance=WEIGHT"),
        ({"negative": {"front": 1}, "guidance": 2}, r"\[negative\] unknown name 'front'"),
        ({"negative": {"anterior": 2}, "guidance": 2}, r"\[negative\] anterior=2: need 0\.\.1"),
        ({"negative": {"context": [[0, 1]]}, "guidance": 2}, r"\[negative\] context has shape \(1, 2\)"),
    ],
)
def test_what_is_refused(model: Model, settings: dict, message: str | None) -> None:
    if message is None:
        model.sample_many(1, **settings)  # a number, as before
        return
    with pytest.raises(ValueError, match=message) as caught:
        model.sample_many(1, condition=GIVEN, **settings)
    assert "\n" not in str(caught.value)


def test_one_volume_takes_one_weight(model: Model) -> None:
    with pytest.raises(ValueError, match="several weights make several volumes; call sample_many"):
        model.sample(guidance=[1, 2], condition=GIVEN)


def test_a_sampler_that_takes_one_weight_a_call_says_so(gaussian: Path) -> None:
    model = load(gaussian, engine="onnxruntime", threads=1)
    model._sampler.mixes_weights = False
    with pytest.raises(ValueError, match="onnxruntime takes one weight a call; sweep with batch=1"):
        model.sample_many(1, guidance=[1, 2], batch=2, condition=GIVEN)
    assert len(list(model.sample_many(1, guidance=[1, 2], condition=GIVEN, steps=2))) == 2


def test_without_an_unconditional_value_a_negative_is_needed(gaussian: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gaussian, tmp_path / "untrained"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["conditions"][0]["unconditional"] = None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    model = load(folder, engine="onnxruntime", threads=1)
    with pytest.raises(ValueError, match="no unconditional value; give negative="):
        model.sample(condition=GIVEN, guidance=2)
    check(
        model.sample(3, condition=GIVEN, guidance=2, negative=NEGATIVE, steps=5).array,
        3,
        0,
        2,
        mean(NEGATIVE),
    )


def test_on_the_command_line(gaussian: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = [f"-c{name}={value}" for name, value in GIVEN.items()]
    given += [f"--negative={name}={value}" for name, value in NEGATIVE.items()]
    output = str(tmp_path / "out.nii.gz")
    common = ["sample", str(gaussian), "-o", output, "--steps", "5", "--seed", "4", "-q", *given]
    assert app([*common, "--guidance", "1..3", "--png", str(tmp_path / "out.png")]) == 0
    for weight in (1, 2, 3):
        image = nibabel.load(tmp_path / f"out_guidance{weight}.nii.gz")
        check(np.asarray(image.dataobj), 4, 0, weight, mean(NEGATIVE))
    assert (tmp_path / "out.png").stat().st_size > 100
    assert app([*common, "-n", "2", "--guidance", "1,2.5"]) == 0
    names = {path.name for path in tmp_path.glob("out_?_*")}
    assert names == {f"out_{i}_guidance{weight}.nii.gz" for i in (0, 1) for weight in ("1", "2.5")}
    for text, message in (
        ("3..1", "guidance=3..1: need 1..1000 weights, the smaller number first"),
        ("0..99999999999999999999", "need 1..1000 weights, the smaller number first"),
        (
            "1..",
            "guidance=1..: need a number (2.5), numbers with commas between (1,2.5,7), or two whole ones (1..10)",
        ),
        ("a..b", "guidance=a..b: need a number (2.5), "),
        ("1,2,1", "guidance=1,2,1: a weight stands there twice; give each once"),
        ("-1", "guidance=-1.0: need 0..100, or leave it out for the conditional branch alone"),
        ("nan", "guidance=nan: need 0..100, or leave it out"),
    ):
        assert app([*common, f"--guidance={text}"]) == 2
        assert message in capfd.readouterr().err


def test_the_example_runs(default_cache: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path), "--steps", "1", "--last", "2"],
        env={**environ, "XDG_CACHE_HOME": str(default_cache)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    picture = next(tmp_path.iterdir())
    assert picture.name == "guidance_sweep.png" and picture.stat().st_size > 10_000
