"""The largest tensor at a profile's maximum: shapes against what ONNX Runtime computes, and the limit of 2^31."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from volcast.export.tensorrt_shapes import LIMIT, check_elements, fused_scores, tensor_shapes
from volcast.runtime.artifact import read_artifact
from volcast.runtime.engine import shapes
from volcast.runtime.spec import ProgramSpec, TensorSpec

SIZES = {"batch": 3, "steps": 7, "d0": 4, "d1": 8, "d2": 12, "o0": 16, "o1": 32, "o2": 48}


@pytest.mark.parametrize("name", ["schedule", "prepare", "step", "decode", "encode"])
def test_shapes_are_onnx_runtime_s(default_artifact_folder: Path, tmp_path: Path, name: str) -> None:
    program = read_artifact(default_artifact_folder).programs[name]  # type: ignore[index]
    path = default_artifact_folder / program.file
    found = tensor_shapes(path, shapes(program, SIZES))
    model = onnx.load(path)
    shown = [value for node in model.graph.node for value in node.output][:: 7 if name == "step" else 1]
    kept = [value for value in model.graph.output if value.name not in shown]
    del model.graph.output[:]
    model.graph.output.extend([*kept, *(helper.make_empty_tensor_value_info(value) for value in shown)])
    onnx.save(model, tmp_path / "all.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "all.onnx", providers=["CPUExecutionProvider"])
    given = {
        t.name: np.zeros([SIZES[s] if isinstance(s, str) else s for s in t.shape], t.dtype)
        for t in program.inputs
    }
    for output, value in zip(session.get_outputs(), session.run(None, given), strict=True):
        assert found[output.name] == value.shape, output.name
    assert {value for node in model.graph.node for value in node.output} <= found.keys()


def test_the_limit_names_program_tensor_elements_and_remedy(default_artifact_folder: Path) -> None:
    program = read_artifact(default_artifact_folder).programs["decode"]
    path = default_artifact_folder / program.file
    check_elements(path, "decode", program, {"batch": 1, "d0": 64, "d1": 64, "d2": 64})
    with pytest.raises(
        ValueError, match=r"^\[build\] decode: \S+ would have (\d+) elements \(1, .*\): .* --size; "
    ) as raised:
        check_elements(path, "decode", program, {"batch": 1, "d0": 128, "d1": 128, "d2": 128})
    text = str(raised.value)
    elements, shape = text.split("have ")[1].split(" elements ")
    assert int(elements) == math.prod(map(int, shape[1 : shape.index(")")].split(","))) >= LIMIT
    assert "--engine cuda --memory-limit" in text


def test_scores_are_no_tensors_where_attention_is_fused(default_artifact_folder: Path) -> None:
    """TensorRT-RTX 1.7 builds this step in half precision with its attentions fused; in float32 it fuses none."""
    program = read_artifact(default_artifact_folder).programs["step"]
    path = default_artifact_folder / program.file
    sizes = {"batch": 1, "d0": 64, "d1": 64, "d2": 64}
    # A score, its scaled form and its softmax in each of the seven attentions.
    assert len(fused_scores(path, tensor_shapes(path, shapes(program, sizes)))) == 21
    check_elements(path, "step", program, sizes)
    with pytest.raises(
        ValueError, match=r"step: \S+ would have 3221225472 elements \(1, 3, 32768, 32768\): "
    ):
        check_elements(path, "step", program, sizes, fused=False)


@pytest.mark.parametrize(
    ("heads", "channels", "fused"), [(2, 64, True), (1, 64, False), (2, 512, False), (2, 8, False)]
)
def test_which_attentions_are_fused(tmp_path: Path, heads: int, channels: int, fused: bool) -> None:
    tensors = {name: [1, heads, 2**15 * 2, channels] for name in "qkvy"}
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in tensors.items()
    }
    nodes = [
        helper.make_node("Einsum", ["q", "k"], ["p"], equation="bhld,bhmd->bhlm"),
        helper.make_node("Softmax", ["p"], ["a"], axis=-1),
        helper.make_node("MatMul", ["a", "v"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [values[name] for name in "qkv"], [values["y"]])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "step.onnx")
    specs = {
        name: TensorSpec(name=name, dtype="float32", shape=tuple(shape)) for name, shape in tensors.items()
    }
    program = ProgramSpec(
        file="step.onnx", inputs=tuple(specs[name] for name in "qkv"), outputs=(specs["y"],), nodes=3, nodes_before=3,
        flops=0, flops_before=0,
    )  # fmt: skip
    if fused:
        check_elements(tmp_path / "step.onnx", "step", program, {})
    else:
        with pytest.raises(ValueError, match=rf"step: [pa] would have {heads * 2**32} elements"):
            check_elements(tmp_path / "step.onnx", "step", program, {})


def limited(tmp_path: Path, size: int) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2**16]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "step.onnx")
    tensors = [TensorSpec(name=name, dtype="float32", shape=("batch", 2**16)) for name in ("x", "y")]
    program = ProgramSpec(
        file="step.onnx",
        inputs=(tensors[0],),
        outputs=(tensors[1],),
        nodes=1,
        nodes_before=1,
        flops=0,
        flops_before=0,
    )
    check_elements(tmp_path / "step.onnx", "step", program, {"batch": size})


def test_the_limit_is_exact(tmp_path: Path) -> None:
    limited(tmp_path, 2**15 - 1)
    with pytest.raises(
        ValueError, match=r"step: . would have 2147483648 elements .* give a smaller --batch or --size$"
    ):
        limited(tmp_path, 2**15)


def test_shapes_that_cannot_be_found(tmp_path: Path) -> None:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [2, 3]), ("y", None))
    ]
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "step.onnx")
    with pytest.raises(
        ValueError, match=r"^\[build\] the shapes of step\.onnx cannot be found: .*NonZero .*; use --engine"
    ):
        tensor_shapes(tmp_path / "step.onnx", {"x": (2, 3)})
