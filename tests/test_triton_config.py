"""config.pbtxt, as Triton's own messages read it."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from volcast.export.triton_config import Serving, model_name, triton_config, write_model
from volcast.runtime.artifact import read_artifact
from volcast.runtime.default_artifact import NAME
from volcast.runtime.interface import inputs, outputs

REPOSITORY = Path(__file__).parent.parent / "triton_repo"


def parsed(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_the_config_describes_every_tensor(gaussian: Path) -> None:
    spec = read_artifact(gaussian)
    config = parsed(triton_config(spec, "g", Serving(artifact='/a "b"', threads=2, queue=9)))
    assert (config.name, config.backend, config.max_batch_size) == ("g", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert [one.name for one in config.input] == [one.name for one in inputs(spec)]
    assert [one.name for one in config.output] == [one.name for one in outputs(spec)]
    assert all(one.optional for one in config.input)
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "artifact": '/a "b"', "artifact_sha256": "", "engine": "auto", "threads": "2", "active": "64", "queue": "9",
    }  # fmt: skip


def test_an_engine_on_a_gpu_gets_an_instance_on_each(gaussian: Path) -> None:
    spec = read_artifact(gaussian)
    kinds = model_config_pb2.ModelInstanceGroup
    for engine, kind in [
        ("openvino", kinds.KIND_CPU),
        ("cuda", kinds.KIND_GPU),
        ("onnxruntime-openvino", kinds.KIND_CPU),
    ]:
        (group,) = parsed(triton_config(spec, "g", Serving(engine=engine))).instance_group  # type: ignore[arg-type]
        assert group.kind == kind


def test_a_name_with_odd_letters_becomes_a_folder(gaussian: Path, tmp_path: Path) -> None:
    spec = read_artifact(gaussian).model_copy(update={"name": "../brain LDM"})
    assert model_name(spec) == "___brain_LDM"
    write_model(tmp_path, model_name(spec), spec)
    model = tmp_path / model_name(spec)
    assert (model / "1" / "model.py").read_bytes() == (
        REPOSITORY / "hippocampus" / "1" / "model.py"
    ).read_bytes()
    with pytest.raises(ValueError, match="exists"):
        write_model(tmp_path, model_name(spec), spec)


def test_the_committed_repository_is_what_would_be_written(
    default_artifact_folder: Path, tmp_path: Path
) -> None:
    write_model(tmp_path, NAME, read_artifact(default_artifact_folder))
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    kept = [path for path in (REPOSITORY / NAME).rglob("*") if path.is_file()]
    assert written == sorted(path.relative_to(REPOSITORY) for path in kept if path.suffix != ".pyc")
    for path in written:
        assert (tmp_path / path).read_bytes() == (REPOSITORY / path).read_bytes(), path
