"""Artifacts as one pipeline: the Gaussian denoiser (see conftest), and upscalers after it."""

from __future__ import annotations

import functools
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import anomaly_models
import nibabel
import numpy as np
import pytest
from upscaler_bundles import export_upscaler

import volcast
from volcast.__main__ import app
from volcast.export.gradient import add_classifier
from volcast.runtime import artifact, pipeline
from volcast.runtime.artifact import read_artifact
from volcast.runtime.chain import parse_stage
from volcast.runtime.engine_onnxruntime import OnnxRuntimeEngine
from volcast.runtime.pipeline import load
from volcast.runtime.volume import Volume, centred_affine

GIVEN = {"anterior": 0.9, "ratio": 0.1}
FIRST: dict[str, Any] = {"steps": 2, "condition": GIVEN, "guidance": 1.5}
THEN: dict[str, Any] = {"steps": 1, "condition": {"noise_level": 40}, "batch": 2}


@pytest.fixture(scope="module")
def upscaler(shared_folder: Any) -> Path:
    make = functools.partial(export_upscaler, dims=3, told=True)
    return shared_folder("upscaler 3 True", make) / "artifact"


@pytest.fixture(scope="module")
def twice(gaussian: Path, upscaler: Path) -> list[Path]:
    return [gaussian, upscaler]


def changed(folder: Path, copy: Path, **keys: Any) -> Path:
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | keys))
    return copy


def test_a_chain_is_its_stages_one_by_one(twice: list[Path]) -> None:
    base, upscaler = (load(folder, "onnxruntime", threads=1) for folder in twice)
    coarse = list(base.sample_many(3, 7, **FIRST))
    given = [{"noise_level": 40, "low_res": volume} for volume in coarse]
    wanted = list(upscaler.sample_many(3, 8, steps=1, condition=given, batch=2))  # stage 1 has seed + 1
    seen: list[tuple[int, int]] = []
    chain = volcast.chain(twice, engine="onnxruntime", threads=1)
    found = list(chain.sample_many(3, 7, then=[THEN], on_step=lambda *step: seen.append(step), **FIRST))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.array, other.array)
        np.testing.assert_array_equal(one.affine, centred_affine((16, 24, 16), (0.5, 0.75, 1.0)))
        assert one.spacing_mm == (0.5, 0.75, 1.0)
    assert seen == [(i, 8) for i in range(1, 9)]  # three samples of two steps, two batches of one
    np.testing.assert_array_equal(chain.sample(7, then=[THEN], **FIRST).array, found[0].array)


def test_three_stages_and_the_image_s_affine(gaussian: Path, upscaler: Path, tmp_path: Path) -> None:
    finer = changed(upscaler, tmp_path / "finer", spacing_mm=[0.25, 0.375, 0.5])
    affine = np.array([[1.0, 0, 0, 5], [0, 1.5, 0, -7], [0, 0, 2.0, 9], [0, 0, 0, 1]])
    image = Volume(np.random.default_rng(0).random((8, 8, 4), np.float32), affine, (1.0, 1.5, 2.0))
    chain = volcast.chain([gaussian, upscaler, finer], engine="onnxruntime", threads=1)
    volume = chain.sample(
        image=image, strength=0.5, steps=2, condition=GIVEN, then=[{"steps": 1}, {"steps": 1}]
    )
    assert volume.array.shape == (32, 32, 16) and volume.spacing_mm == (0.25, 0.375, 0.5)
    np.testing.assert_allclose(
        volume.affine @ [-0.5, -0.5, -0.5, 1], affine @ [-0.5, -0.5, -0.5, 1], atol=1e-12
    )
    np.testing.assert_allclose(volume.affine @ [31.5, 31.5, 15.5, 1], affine @ [7.5, 7.5, 3.5, 1], atol=1e-12)


def test_the_steps_of_an_inpainting_stage_are_all_foretold(twice: list[Path]) -> None:
    image = np.random.default_rng(0).random((8, 8, 4), np.float32)
    mask = np.zeros(image.shape, np.float32)
    mask[:2, :2, :2] = 1
    seen: list[tuple[int, int]] = []
    painting = {
        "image": image,
        "inpaint": volcast.Inpaint(mask, resamples=3),
        "scheduler": "ddpm",
        "steps": 2,
    }
    chain = volcast.chain(twice, engine="onnxruntime", threads=1)
    chain.sample(1, condition=GIVEN, then=[{"steps": 1}], on_step=lambda *step: seen.append(step), **painting)
    # Two rows, the first run three times in all (RePaint), and the upscaler's one.
    assert seen == [(i, 5) for i in range(1, 6)]


def test_a_stage_is_closed_before_the_next_one_opens(
    twice: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_now: list[str] = []

    class Counted:
        def __init__(self, program: Any, name: str) -> None:
            self._program, self._name = program, name
            open_now.append(name)

        def __call__(self, inputs: Any) -> Any:
            return self._program(inputs)

        def __del__(self) -> None:
            open_now.remove(self._name)

    open_program = OnnxRuntimeEngine.open

    def opened(self: Any, path: Path, program: Any, sizes: Any) -> Any:
        other = {name for name in open_now if not name.startswith(str(path.parent))}
        assert not other, other
        return Counted(open_program(self, path, program, sizes), str(path))

    monkeypatch.setattr(OnnxRuntimeEngine, "open", opened)
    chain = volcast.chain(twice, engine="onnxruntime", threads=1)
    chain.sample(steps=1, condition=GIVEN, then=[{"steps": 1}])
    gc.collect()
    assert not open_now


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({}, [THEN, THEN], r"\[chain\] then has settings for 2 stages: need 1"),
        ({}, [{"steps": 0}], r"\[chain\] stage 2, bundle: \[sample\] steps=0"),
        ({}, [{"noise_level": 3}], r"stage 2, bundle: \[sample\] unknown setting noise_level"),
        ({}, [{"condition": {"noise_level": 351}}], r"stage 2, bundle: \[condition\] noise_level=351: need 0\.\.350"),
        ({}, [{"condition": {"low_res": 1}}], "low_res comes from the stage before; leave it out"),
        ({}, [{"condition": [{}, {}]}], "need one mapping for all samples of a later stage"),
        ({}, [{"image": np.zeros((16, 24, 16))}], "a later stage starts from the one before"),
        ({}, [{"inpaint": volcast.Inpaint(np.ones((16, 24, 16)))}], "inpaint: a later stage starts from the one before"),
        ({}, [{"strength": 0.5}], r"stage 2, bundle: \[sample\] strength=0\.5 without an image"),
        ({}, [{"reuse": 2}], r"stage 2, bundle: \[sample\] reuse=2: bundle has no programs for it"),
        ({}, [{"size": (4, 4, 4)}], "stage 2, bundle:.*low_res has shape"),
        ({"guidance": [1, 2]}, (), "a chain takes one weight; sweep its stages one by one"),
        ({"condition": {"anterior": 2}}, (), r"^\[condition\] anterior=2: need 0\.\.1"),
        ({"n": 0}, (), r"n=0: need 1"),
        ({"seed": -1}, (), "seed=-1"),
        ({"size": (2, 2, 2), "nothing": 1}, (), "unknown setting nothing"),
    ],
)  # fmt: skip
def test_what_is_refused_before_any_work(
    twice: list[Path], monkeypatch: pytest.MonkeyPatch, first: dict[str, Any], then: Any, message: str
) -> None:
    monkeypatch.setattr(OnnxRuntimeEngine, "open", lambda *_: pytest.fail("work was done"))
    chain = volcast.chain(twice, engine="onnxruntime", threads=1)
    with pytest.raises(ValueError, match=message) as caught:
        chain.sample_many(**({"n": 2} | first), then=then)
    assert "\n" not in str(caught.value)


def test_a_later_classifier_is_refused_before_any_work(
    gaussian: Path, upscaler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = read_artifact(upscaler).latent_shape
    add_classifier(upscaler, anomaly_models.classifier(3, shape), tmp_path / "classified")
    monkeypatch.setattr(OnnxRuntimeEngine, "open", lambda *_: pytest.fail("work was done"))
    chain = volcast.chain([gaussian, tmp_path / "classified"], "onnxruntime", 1, "8GiB")
    with pytest.raises(ValueError, match=r"stage 2, bundle: \[classifier\] label=1: memory_limit"):
        chain.sample_many(1, then=[{"label": 1}])


def test_artifacts_that_do_not_fit(gaussian: Path, upscaler: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 artifacts: need two or more"):
        volcast.chain([gaussian])
    with pytest.raises(ValueError, match="gaussian after gaussian: it takes no low-resolution image"):
        volcast.chain([gaussian, gaussian])
    other = changed(upscaler, tmp_path / "other", spacing_mm=[1.0, 1.5, 2.0])
    with pytest.raises(ValueError, match="takes voxels of 2 x 3 x 4 mm, those before it have 1 x 1.5 x 2"):
        volcast.chain([gaussian, other])
    hounsfield = {"network": [0, 1], "written": [-1000, 1000], "unit": "HU"}
    ct = changed(gaussian, tmp_path / "ct", intensity=hounsfield)
    with pytest.raises(
        ValueError, match=r"takes intensities of the network's own, those before it are of -1000\.\.1000"
    ):
        volcast.chain([ct, upscaler])
    pixels = json.loads((gaussian / "manifest.json").read_text())["programs"]
    two = changed(
        gaussian,
        tmp_path / "pixels",
        programs={name: one for name, one in pixels.items() if name not in ("decode", "encode")},
    )
    with pytest.raises(ValueError, match="takes 1 channels of 3 axes, the samples before it have 2 of 3"):
        volcast.chain([two, upscaler])


def test_on_the_command_line(
    twice: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gaussian, upscaler = map(str, twice)
    output = tmp_path / "out.nii.gz"
    common = [
        "sample",
        gaussian,
        "-o",
        str(output),
        "-q",
        "--seed",
        "7",
        "--engine",
        "onnxruntime",
        "--threads",
        "1",
    ]
    given = [
        *common,
        "--steps",
        "2",
        "--guidance",
        "1.5",
        *(f"-c{name}={value}" for name, value in GIVEN.items()),
    ]
    read: list[Path] = []
    digest = artifact.sha256
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "sha256", lambda path: read.append(path) or digest(path))
        assert app([*given, "-n2", "--then", f"{upscaler},steps=1,batch=2,noise_level=40"]) == 0
    assert len(read) == len(set(read)) > 0  # no file is checked twice
    chain = volcast.chain(twice, engine="onnxruntime", threads=1)
    for number, wanted in enumerate(chain.sample_many(2, 7, then=[THEN], **FIRST)):
        image = nibabel.load(tmp_path / f"out_{number}.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), wanted.array)
        assert image.header.get_zooms() == (0.5, 0.75, 1.0)
    monkeypatch.setattr(pipeline.Model, "sample_many", lambda *_, **__: pytest.fail("work was done"))
    for text, message in (
        (f"{upscaler},steps=two", "steps=two is no number"),
        (f"{upscaler},noise_level", "'noise_level': write name=number"),
        (
            f"{upscaler},level=3",
            "unknown name 'level'; settings: steps, batch, eta, guidance, label, scale, reuse, ",
        ),
        (f"{upscaler},level=3", "; conditions: tau, noise_level"),
        (f"{upscaler},steps=3,steps=4", "steps is given twice; give it once"),
        (f"{upscaler},noise_level=3,noise_level=4", "noise_level is given twice; give it once"),
        (str(tmp_path), "manifest.json"),
        (gaussian, "takes no low-resolution image"),
    ):
        assert app([*given, "--then", text]) == 2
        assert message in capfd.readouterr().err
    text = f"{upscaler}, steps=3,eta = 0.5,scheduler= ddim,label=1,scale=3, noise_level = 4"
    assert parse_stage(text, chain.specs[1]) == {
        "steps": 3, "eta": 0.5, "scheduler": "ddim", "label": 1, "scale": 3.0, "condition": {"noise_level": 4.0},
    }  # fmt: skip
