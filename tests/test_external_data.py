"""External data is found wherever ONNX allows a tensor, against the onnx package's own writer."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from volcast.runtime.artifact import read_artifact
from volcast.runtime.external_data import external_data


def tensor(location: str) -> onnx.TensorProto:
    result = numpy_helper.from_array(np.zeros(2, np.float32), location)
    result.ClearField("raw_data")
    result.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", "8")):
        entry = result.external_data.add()
        entry.key, entry.value = key, value
    return result


def model() -> onnx.ModelProto:
    inner = helper.make_graph([], "inner", [], [], [tensor("in/subgraph")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, value=tensor("in/attribute"))
    node.attribute.append(helper.make_attribute("many", [tensor("in/list")]))
    graph = helper.make_graph([node], "outer", [], [], [tensor("../up"), numpy_helper.from_array(np.ones(9))])
    graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor("sparse"), indices=tensor("/abs")))
    function = onnx.FunctionProto(name="f")
    function.node.append(helper.make_node("Constant", [], ["k"], value=tensor("in/function")))
    result = helper.make_model(graph, producer_name="x" * 300)
    result.functions.append(function)
    result.training_info.add().algorithm.initializer.append(tensor("training"))
    return result


def test_every_place_is_found(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    wanted = {"in/subgraph", "in/attribute", "in/list", "../up", "sparse", "/abs", "in/function", "training"}
    assert external_data(tmp_path / "m.onnx") == wanted


def test_files_without_external_data(gaussian: Path) -> None:
    assert all(external_data(path) == set() for path in gaussian.glob("*.onnx"))


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname", "unlisted.bin"])
def test_an_artifact_that_names_other_files_is_refused(gaussian: Path, tmp_path: Path, location: str) -> None:
    folder = Path(shutil.copytree(gaussian, tmp_path / "artifact"))
    program = onnx.load(folder / "step.onnx")
    program.graph.initializer.append(tensor(location))
    onnx.save(program, folder / "step.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["step.onnx"] = hashlib.sha256((folder / "step.onnx").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="step.onnx names external data") as error:
        read_artifact(folder)
    assert location in str(error.value)


@pytest.mark.parametrize("data", [b"", b"\xff" * 20, b"\x3a\x05ab", b"not a protobuf"])
def test_no_onnx(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ValueError, match="m.onnx is"):
        external_data(tmp_path / "m.onnx")


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    data = b""
    for _ in range(500):  # attribute.g of a node of a graph
        for field in (6, 5, 1):
            size = len(data)
            prefix = bytes([field << 3 | 2, size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14])
            data = prefix + data
    size = len(data)
    (tmp_path / "m.onnx").write_bytes(bytes([7 << 3 | 2, size & 0x7F | 0x80, size >> 7]) + data)
    with pytest.raises(ValueError, match="is not an ONNX file"):
        external_data(tmp_path / "m.onnx")


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=5),
       cut=st.integers(0, 10**6))  # fmt: skip
def test_mutated_files_end_in_a_value_error_at_worst(tmp_path: Path, edits: list, cut: int) -> None:
    data = bytearray(model().SerializeToString())
    for place, byte in edits:
        data[place % len(data)] = byte
    (tmp_path / "m.onnx").write_bytes(data[: 1 + cut % len(data)] if cut % 2 else data)
    try:
        external_data(tmp_path / "m.onnx")
    except ValueError as error:
        assert "\n" not in str(error)
