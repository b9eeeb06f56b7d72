"""`volcast quantize`: an int8 artifact that runs everywhere, made whole or not at all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import volcast
from volcast.__main__ import app
from volcast.export.calibration import draw_condition
from volcast.export.quantize import quantize
from volcast.runtime import footprint_openvino
from volcast.runtime.artifact import digests, read_artifact
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.host_memory import HostMemory
from volcast.runtime.programs import Programs
from volcast.runtime.slab_decode import decode_slabs
from volcast.runtime.slab_schedule import schedule
from volcast.runtime.slabs import SlabProgram
from volcast.runtime.spec import ArtifactSpec

ZOO = "brats_3d"
FEW = {"samples": 2, "steps": 1, "threads": 1}


@pytest.fixture(scope="module")
def source(zoo_artifact: Any) -> Path:
    """A narrowed latent diffusion model of MONAI's zoo, float32."""
    return zoo_artifact(ZOO)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "artifact"
    quantize(source, folder, **FEW)
    return folder


def refuse(arguments: list[object], capfd: pytest.CaptureFixture[str]) -> str:
    assert app(["quantize", *map(str, arguments)]) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith("volcast: [") and err.count("\n") == 1
    return err


def test_the_manifest_says_what_was_done(source: Path, made: Path) -> None:
    before, after = read_artifact(source), read_artifact(made)
    assert after.precision == "int8" and after.files == digests(made)
    facts = after.provenance
    assert facts["quantization_data"] == "2 samples of 1 steps, seeds 1..2"
    # No guidance here, so one call a step and sample; one decode a sample.
    assert facts["quantization_calls"] == "step 2, decode 2"
    assert facts["quantization_step_was"] == f"sha256 {before.files['step.onnx']}"
    assert facts.items() >= before.provenance.items()
    for name in ("schedule", "encode"):
        assert after.files[f"{name}.onnx"] == before.files[f"{name}.onnx"]
    # The slabs are those of the int8 decoder; none of the float32 one's files came along.
    assert before.slabs is not None and after.slabs is not None
    files = [segment.program.file for segment in after.slabs.segments]
    assert after.files.keys() == {*files, *(program.file for program in before.programs.values())}
    assert all(after.files[file] != before.files.get(file) for file in files[1:-1])
    counts = [len(onnx.load(made / f"{name}.onnx").graph.node) for name in ("step", "decode")]
    assert counts == [after.programs["step"].nodes, after.programs["decode"].nodes]


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_engines_run_it_and_its_volumes_are_near(source: Path, made: Path, engine: str) -> None:
    given = {"engine": engine, "threads": 1}
    wanted = volcast.load(source, **given).sample(7, steps=1).array
    found = volcast.load(made, **given).sample(7, steps=1).array
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    # Random weights, which no training made robust; a wrong scale or axis gives errors of 1.
    assert 1e-5 < error < 0.2


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_slabs_of_an_int8_decoder_are_that_decoder(source: Path, made: Path, engine: str) -> None:
    spec, opened = read_artifact(made), open_engine(engine, 1)
    z = np.random.default_rng(3).standard_normal((1, spec.latent_shape[0], 4, 4, 4)).astype(np.float32)
    axes = {"batch": 1, "d0": 4, "d1": 4, "d2": 4}
    int8, float32 = (
        Programs(folder, spec, opened).open_alone(spec.programs["decode"], axes)({"z": z})["image"]
        for folder in (made, source)
    )
    assert spec.slabs is not None
    program = SlabProgram(spec.slabs, (4, 4, 4))
    stored = {segment.value for segment in spec.slabs.segments}
    passes = [replace(one, height=3) for one in schedule(program, program.whole, stored)]
    found = decode_slabs(program, passes, Programs(made, spec, opened).open_alone, z)
    # OpenVINO rounds at the same places (1e-7). ONNX Runtime's optimiser moves some: half of what int8 costs is less
    # than slabs of the float32 decoder would be away.
    assert np.linalg.norm(found - int8) < 0.5 * np.linalg.norm(int8 - float32)


@pytest.mark.parametrize("name", ["step", "decode"])
def test_int8_programs_are_foretold_to_take_less(source: Path, made: Path, name: str) -> None:
    """OpenVINO's do (`docs/memory.md`); pairs that were counted as operators on float32 values would add to both."""
    axes = {"batch": 1, "d0": 12, "d1": 16, "d2": 12}
    int8, float32 = (
        HostMemory(folder, read_artifact(folder), footprint_openvino.MEMORY, None).footprint(name, axes)
        for folder in (made, source)
    )
    assert int8.peak < float32.peak


def test_the_decoder_may_stay_float32_and_the_same_seeds_give_the_same_bytes(
    source: Path, made: Path, tmp_path: Path
) -> None:
    spec = quantize(source, tmp_path / "int8", **FEW, decode=False)
    assert spec.files["decode.onnx"] == read_artifact(source).files["decode.onnx"]
    assert "decode" not in spec.provenance["quantization_layers"]
    assert spec.files["step.onnx"] == read_artifact(made).files["step.onnx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", 0], "[quantize] samples=0: calibration needs 1..1000"),
        (["--steps", 0], "steps=0: need 1..1000"),
        (["--seed", -1], "seed=-1"),
        (["--threads", 0], "threads=0"),
        (["-c", "nothing=1"], "unknown name 'nothing'"),
    ],
)
def test_bad_arguments(source: Path, tmp_path: Path, capfd, arguments: list[object], message: str) -> None:
    assert message in refuse([source, "-o", tmp_path / "int8", *arguments], capfd)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(source: Path, made: Path, tmp_path: Path, capfd) -> None:
    (tmp_path / "int8").mkdir()
    assert "exists: remove it" in refuse([source, "-o", tmp_path / "int8"], capfd)
    assert "is quantised already" in refuse([made, "-o", tmp_path / "again"], capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_stored_weights_are_not_rounded_twice(source: Path, tmp_path: Path, capfd) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "half"))
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "precision": "fp16"}))
    assert "export the bundle with --precision fp32" in refuse([folder, "-o", tmp_path / "int8"], capfd)


def test_nothing_to_quantise(gaussian: Path, tmp_path: Path, capfd) -> None:
    assert "step of gaussian has no convolution" in refuse([gaussian, "-o", tmp_path / "int8"], capfd)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_numbers_leave_nothing(source: Path, tmp_path: Path, capfd) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "bad"))
    model = onnx.load(folder / "step.onnx")
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 5)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, folder / "step.onnx")
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "files": digests(folder)}))
    told = refuse([folder, "-o", tmp_path / "int8", "--samples", 1, "--steps", 1], capfd)
    assert "is not finite while sampling" in told
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def described(conditions: list[dict[str, object]]) -> ArtifactSpec:
    tensor = {"name": "x", "dtype": "float32", "shape": [1, 2, 4, 4]}
    program = {"file": "s.onnx", "inputs": [tensor], "outputs": [tensor], "nodes": 0, "nodes_before": 0, "flops": 0,
               "flops_before": 0}  # fmt: skip
    return ArtifactSpec.model_validate(
        {"format": 1, "name": "m", "precision": "fp32", "axes": [], "programs": {"schedule": program, "step": program},
         "scheduler": {}, "scale_factor": 1, "latent_shape": [2, 4, 4], "spacing_mm": [1, 1], "conditions": conditions,
         "files": {"s.onnx": "0" * 64}}
    )  # fmt: skip


def test_conditions_are_drawn_over_their_range_and_given_ones_kept() -> None:
    def field(name: str, default: object, maximum: float = 3) -> dict[str, object]:
        return {"name": name, "minimum": 1, "maximum": maximum, "default": default}

    follows = {"numerator": {"a": 1.0}, "denominator": {"": 1.0}}
    spec = described(
        [
            {"name": "context", "shape": [3], "fields": [field("a", 1), field("b", 1), field("c", follows)]},
            {"name": "label", "dtype": "int64", "shape": [1], "fields": [field("kind", 1)]},
        ]
    )
    generator = np.random.default_rng(0)
    drawn = [draw_condition(spec, {"b": 2.5}, generator) for _ in range(200)]
    assert all(each.keys() == {"a", "b", "kind"} and each["b"] == 2.5 for each in drawn)
    # 200 even draws: the chance that none falls in a given twentieth of the range is 0.95^200 = 4e-5.
    values = np.array([each["a"] for each in drawn])
    assert 1 <= values.min() < 1.1 and 2.9 < values.max() <= 3
    assert {each["kind"] for each in drawn} == {1, 2, 3}


def test_an_array_that_nobody_gives_is_named() -> None:
    spec = described([{"name": "mask", "shape": [1, 4, 4]}])
    with pytest.raises(
        ValueError, match="no calibration data for the condition mask: give it, --condition mask=@"
    ):
        draw_condition(spec, {}, np.random.default_rng(0))
    assert draw_condition(spec, {"mask": "m"}, np.random.default_rng(0)) == {"mask": "m"}
