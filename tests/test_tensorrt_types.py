"""Typed networks: every rounding of half precision, computed by ONNX Runtime, against the float32 program."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from rounded_onnx import rounded, run

from volcast.export.tensorrt_types import SOURCE, typed
from volcast.runtime.artifact import read_artifact
from volcast.runtime.spec import Precision

UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-8}
SIZES = {"batch": 2, "steps": 50, "d0": 8, "d1": 8, "d2": 8, "o0": 32, "o1": 32, "o2": 32}
FLOAT32 = {"GroupNormalization", "LayerNormalization", "Softmax", "Exp", "Sin", "Cos"}


def model(
    nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], weights: dict[str, np.ndarray]
) -> Any:
    def infos(named: dict[str, Any]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in named.items()
        ]

    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), stored)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return onnx_ir.from_proto(made)


def kinds(made: onnx_ir.Model) -> list[str]:
    return [node.op_type for node in made.graph]


def inputs_of(path: Path, name: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    if name == "schedule":
        return {"timesteps": np.linspace(999, 0, 50, dtype=np.float32)}
    return {
        tensor.name: generator.integers(0, 8, shape)
        if tensor.dtype == "int64"
        else generator.standard_normal(shape).astype(np.float32)
        for tensor in read_artifact(path).programs[name].inputs  # type: ignore[index]
        for shape in [[SIZES.get(size, size) for size in tensor.shape]]
    }


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("network", ["hippocampus", "brats_3d", "maisi_rflow"])
def test_every_program_rounds_as_its_type_does(
    network: str, precision: str, zoo_artifact: Any, default_artifact_folder: Path, tmp_path: Path
) -> None:
    folder = default_artifact_folder if network == "hippocampus" else zoo_artifact(network)
    for name, program in read_artifact(folder).programs.items():
        made = onnx_ir.load(folder / program.file)
        before = {value.name: value.dtype for value in (*made.graph.inputs, *made.graph.outputs)}
        typed(made, Precision(precision))
        assert {value.name: value.dtype for value in (*made.graph.inputs, *made.graph.outputs)} == before
        onnx_ir.save(made, tmp_path / program.file)
        onnx.checker.check_model(str(tmp_path / program.file), full_check=True)
        half = rounded(tmp_path / program.file, tmp_path / "rounded.onnx")
        assert not half & FLOAT32
        given = inputs_of(folder, name)
        count = len(list(made.graph))
        for wanted, result in zip(
            run(folder / program.file, given), run(tmp_path / "rounded.onnx", given), strict=True
        ):
            if not half:
                np.testing.assert_array_equal(result, wanted)
                continue
            error = np.linalg.norm(result - wanted) / np.linalg.norm(wanted)
            # Each operator rounds once, independently of the others; less than a tenth of one would be none at all.
            assert UNIT[precision] / 10 < error < UNIT[precision] * np.sqrt(count), name


def test_float32_stays_as_it_is(gaussian: Path) -> None:
    made = onnx_ir.load(gaussian / "step.onnx")
    before = onnx_ir.to_proto(made).SerializeToString()
    typed(made, Precision.FP32)
    assert onnx_ir.to_proto(made).SerializeToString() == before


def test_the_emulation_rounds_as_numpy_does(tmp_path: Path) -> None:
    casts = [("Cast", "x", "h", TensorProto.FLOAT16), ("Cast", "h", "y", TensorProto.FLOAT)]
    made = model(
        [helper.make_node(k, [a], [b], to=to) for k, a, b, to in casts], {"x": [999]}, {"y": [999]}, {}
    )
    onnx_ir.save(made, tmp_path / "a.onnx")
    rounded(tmp_path / "a.onnx", tmp_path / "b.onnx")
    x = np.random.default_rng(0).standard_normal(999).astype(np.float32)
    x[np.abs(x) < 1e-4] = 1
    (y,) = run(tmp_path / "b.onnx", {"x": x})
    np.testing.assert_array_equal(y, x.astype(np.float16).astype(np.float32))


def test_products_are_half_norms_are_not_and_vectors_wait(tmp_path: Path) -> None:
    weights = {
        "w": np.ones((4, 2, 3), np.float32), "s": np.ones(4, np.float32), "b": np.zeros(4, np.float32),
        "two": np.array([2], np.float32), "unread": np.ones(3, np.float32),
    }  # fmt: skip
    made = model(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1]),
            helper.make_node("Mul", ["row", "two"], ["scaled"]),
            helper.make_node("Unsqueeze", ["scaled", "axis"], ["shift"]),
            helper.make_node("Add", ["c", "shift"], ["a"]),
            helper.make_node("GroupNormalization", ["a", "s", "b"], ["n"], num_groups=2),
            helper.make_node("Sigmoid", ["n"], ["g"]),
            helper.make_node("Mul", ["n", "g"], ["out"]),
        ],
        {"x": ["batch", 2, 8], "row": ["batch", 4]}, {"out": ["batch", 4, 8], "shift": ["batch", 4, 1]},
        weights | {"axis": np.array([2], np.int64)},
    )  # fmt: skip
    typed(made, Precision.FP16)
    # x to half; the row where it meets the volume; around the norm; and the output.
    assert kinds(made) == [
        "Cast", "Conv", "Mul", "Unsqueeze", "Cast", "Add", "Cast", "GroupNormalization", "Cast", "Sigmoid", "Mul",
        "Cast",
    ]  # fmt: skip
    dtypes = {name: value.const_value.dtype.name for name, value in made.graph.initializers.items()}
    assert dtypes == {"w.fp16": "FLOAT16", "s": "FLOAT", "b": "FLOAT", "two": "FLOAT", "axis": "INT64"}
    assert made.graph.initializers["w.fp16"].metadata_props[SOURCE] == "w"
    assert [value.name for value in made.graph.outputs] == ["out", "shift"]
    onnx_ir.save(made, tmp_path / "typed.onnx")
    onnx.checker.check_model(str(tmp_path / "typed.onnx"), full_check=True)


def test_weights_that_are_stored_in_half_lose_their_casts() -> None:
    stored = {"w": np.full((4, 2, 3), 1 / 3, np.float16)}
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "wide"], ["y"]),
    ]
    made = model(nodes, {"x": [1, 2, 8]}, {"y": [1, 4, 6]}, stored)
    typed(made, Precision.FP16)
    assert Counter(kinds(made)) == {"Cast": 2, "Conv": 1}
    ((_, weight),) = made.graph.initializers.items()
    np.testing.assert_array_equal(weight.const_value.numpy(), stored["w"])
    assert weight.metadata_props[SOURCE] == "w"


def test_attention_is_scaled_before_its_product_in_float16_alone(tmp_path: Path) -> None:
    """Keys and queries of 300 give 16 * 90000 = 1.44e6 before the scale, which float16 does not hold, and 5625 after."""
    nodes = [
        helper.make_node("Einsum", ["q", "k"], ["p"], equation="bld,bmd->blm"),
        helper.make_node("Mul", ["p", "s"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["a"], axis=-1),
        helper.make_node("Einsum", ["a", "v"], ["y"], equation="blm,bmd->bld"),
    ]
    shape = {"q": [1, 4, 16], "k": [1, 6, 16], "v": [1, 6, 16]}
    given = {name: np.full(size, 300, np.float32) for name, size in shape.items()}
    weights = {"s": np.array(1 / 256, np.float32)}
    for precision, order in (
        (Precision.FP16, ["Mul", "MatMul", "Softmax", "MatMul"]),
        (Precision.BF16, ["MatMul", "Mul", "Softmax", "MatMul"]),
    ):
        made = model(nodes, shape, {"y": [1, 4, 16]}, weights)
        typed(made, precision)
        assert [kind for kind in kinds(made) if kind not in ("Cast", "Transpose")] == order
        onnx_ir.save(made, tmp_path / "a.onnx")
        onnx.checker.check_model(str(tmp_path / "a.onnx"), full_check=True)
        rounded(tmp_path / "a.onnx", tmp_path / "b.onnx")
        for result in run(tmp_path / "b.onnx", given):
            np.testing.assert_allclose(result, 300, rtol=2**-7)


def test_quantised_values_keep_their_type(tmp_path: Path) -> None:
    """Scales and what is quantised are float32; what comes out of int8 meets the product in half precision."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "scale", "zero"], ["i"]),
        helper.make_node("DequantizeLinear", ["i", "scale", "zero"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["y"]),
    ]
    weights = {
        "w": np.ones((2, 2, 1), np.float32),
        "scale": np.array(0.5, np.float32),
        "zero": np.array(0, np.int8),
    }
    made = model(nodes, {"x": [1, 2, 8]}, {"y": [1, 2, 8]}, weights)
    typed(made, Precision.FP16)
    assert kinds(made) == [
        "Cast", "Conv", "Cast", "QuantizeLinear", "DequantizeLinear", "Cast", "Conv", "Cast"
    ]  # fmt: skip
    onnx_ir.save(made, tmp_path / "a.onnx")
    onnx.checker.check_model(str(tmp_path / "a.onnx"), full_check=True)
    (result,) = run(tmp_path / "a.onnx", {"x": np.full((1, 2, 8), 1.25, np.float32)})
    np.testing.assert_array_equal(result, 5)  # 2.5, a multiple of the scale, from both channels


@pytest.mark.parametrize("equation", ["bhld,bhmd->bhlm", "bhlm,bhmd->bhld", "ld,md->lm"])
def test_batched_products_become_matmul(equation: str, tmp_path: Path) -> None:
    letters = dict(zip("bhlmd", (2, 3, 4, 5, 6), strict=True))
    left, right, out = equation.replace("->", ",").split(",")
    shapes = {"a": [letters[c] for c in left], "b": [letters[c] for c in right]}
    made = model(
        [helper.make_node("Einsum", ["a", "b"], ["y"], equation=equation)], shapes,
        {"y": [letters[c] for c in out]}, {},
    )  # fmt: skip
    typed(made, Precision.BF16)
    assert "Einsum" not in kinds(made) and "MatMul" in kinds(made)
    onnx_ir.save(made, tmp_path / "a.onnx")
    rounded(tmp_path / "a.onnx", tmp_path / "b.onnx")
    given = {
        name: np.random.default_rng(1).standard_normal(size).astype(np.float32)
        for name, size in shapes.items()
    }
    (result,) = run(tmp_path / "b.onnx", given)
    wanted = np.einsum(equation, given["a"], given["b"])
    # Both operands and the product round once.
    assert np.linalg.norm(result - wanted) < 2 * UNIT["bf16"] * np.linalg.norm(wanted)


def test_other_products_stay_einsum() -> None:
    nodes = [helper.make_node("Einsum", ["a", "b"], ["y"], equation="ij,ik->jk")]
    made = model(nodes, {"a": [3, 4], "b": [3, 5]}, {"y": [4, 5]}, {})
    typed(made, Precision.FP16)
    assert "Einsum" in kinds(made)


@pytest.mark.parametrize(("precision", "remedy"), [("fp16", "bf16 or fp32"), ("bf16", "fp32")])
def test_a_weight_that_overflows_is_named(precision: str, remedy: str) -> None:
    nodes = [helper.make_node("Conv", ["x", "heavy"], ["y"])]
    made = model(nodes, {"x": [1, 2, 8]}, {"y": [1, 4, 6]}, {"heavy": np.full((4, 2, 3), 3.4e38, np.float32)})
    with pytest.raises(
        ValueError,
        match=rf"^\[build\] weight heavy reaches 3\.4e\+38: too large for {precision}; use --precision {remedy}$",
    ):
        typed(made, Precision(precision))
