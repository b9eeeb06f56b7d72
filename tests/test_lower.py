"""ONNX programs as raw device operations: the same numbers as ONNX Runtime's, at any batch and size."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_oracle import check_draft, program_inputs
from torch import Tensor

from volcast.export.lower import lower
from volcast.runtime.artifact import read_artifact

VOLUME, IMAGE = ["n", 4, "d", "h", "w"], ["n", 4, "d", "h"]
TOKENS, SIGNAL, VECTOR = ["n", "l", 4], ["n", 4, "l"], ["n", 4]


def write(path: Path, nodes: list, inputs: dict[str, list], weights: dict[str, Any] | None = None) -> Path:
    """An ONNX file of nodes `(type, inputs, outputs, attributes)` whose output is `out`."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    made = [helper.make_node(*node[:3], **node[3]) for node in nodes]
    graph = helper.make_graph(made, "g", values, [out], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def drawn(inputs: dict[str, list], batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    sizes = {"n": batch, "l": 5 * batch, "d": 4, "h": 4 * batch, "w": 6}
    return {
        name: torch.randn([sizes[s] if isinstance(s, str) else s for s in shape], generator=generator)
        for name, shape in inputs.items()
    }


INTS = np.int64
THREE = {"strides": [1] * 3, "pads": [1] * 6, "dilations": [1] * 3, "group": 1}
ONE: dict[str, tuple[tuple, dict, dict]] = {
    # name: (type, inputs, attributes), inputs of the program, weights
    "convolution": (("Conv", ["x", "w", "b"], THREE), {"x": VOLUME}, {"w": random((6, 4, 3, 3, 3)), "b": random((6,))}),
    "strided, grouped, dilated": (
        ("Conv", ["x", "w"], {"strides": [2, 1], "pads": [2, 2, 2, 2], "dilations": [2, 2], "group": 2}),
        {"x": IMAGE}, {"w": random((6, 2, 3, 3))}),
    "along one axis": (("Conv", ["x", "w"], {"pads": [1, 1]}), {"x": SIGNAL}, {"w": random((6, 4, 3))}),
    "transposed": (
        ("ConvTranspose", ["x", "w", "b"], {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 0]}),
        {"x": IMAGE}, {"w": random((4, 6, 4, 4)), "b": random((6,))}),
    "group norm": (
        ("GroupNormalization", ["x", "w", "b"], {"num_groups": 2, "epsilon": 1e-3}), {"x": VOLUME},
        {"w": random((4,)), "b": random((4,))}),
    "layer norm": (
        ("LayerNormalization", ["x", "w", "b"], {"axis": -1, "epsilon": 1e-3}), {"x": TOKENS},
        {"w": random((4,)), "b": random((4,))}),
    "layer norm without bias": (("LayerNormalization", ["x", "w"], {"axis": 2}), {"x": TOKENS}, {"w": random((4,))}),
    "product of tokens": (("MatMul", ["x", "w"], {}), {"x": TOKENS}, {"w": random((4, 6))}),
    "product of vectors": (("MatMul", ["x", "w"], {}), {"x": VECTOR}, {"w": random((4, 6))}),
    "product of a volume's last axis": (("MatMul", ["x", "w"], {}), {"x": ["n", 4, "d", 6]}, {"w": random((6, 3))}),
    "product of two": (("MatMul", ["x", "y"], {}), {"x": TOKENS, "y": ["n", 4, 3]}, {}),
    "einsum": (("Einsum", ["x", "y"], {"equation": "blc,bmc->bml"}), {"x": TOKENS, "y": ["n", 3, 4]}, {}),
    "softmax": (("Softmax", ["x"], {"axis": 1}), {"x": VOLUME}, {}),
    "gelu": (("Gelu", ["x"], {"approximate": "none"}), {"x": TOKENS}, {}),
    "gelu by tanh": (("Gelu", ["x"], {"approximate": "tanh"}), {"x": TOKENS}, {}),
    "relu": (("Relu", ["x"], {}), {"x": VOLUME}, {}),
    "leaky relu": (("LeakyRelu", ["x"], {"alpha": 0.2}), {"x": VOLUME}, {}),
    "sigmoid": (("Sigmoid", ["x"], {}), {"x": VOLUME}, {}),
    "exp": (("Exp", ["x"], {}), {"x": VOLUME}, {}),
    "sin": (("Sin", ["x"], {}), {"x": VECTOR}, {}),
    "cos": (("Cos", ["x"], {}), {"x": VECTOR}, {}),
    "clip": (("Clip", ["x", "low", "high"], {}), {"x": VOLUME}, {"low": np.float32(-0.5), "high": np.float32(1)}),
    "clip above": (("Clip", ["x", "", "high"], {}), {"x": VOLUME}, {"high": np.float32(0.5)}),
    "a number less": (("Sub", ["two", "x"], {}), {"x": VOLUME}, {"two": np.float32(2)}),
    "division": (("Div", ["x", "two"], {}), {"x": VOLUME}, {"two": np.full((1,), 2, np.float32)}),
    "square": (("Mul", ["x", "x"], {}), {"x": VOLUME}, {}),
    "a bias of tokens": (("Add", ["x", "b"], {}), {"x": TOKENS}, {"b": random((4,))}),
    "a factor a channel": (("Mul", ["b", "x"], {}), {"x": VOLUME}, {"b": random((1, 4, 1, 1, 1))}),
    "a tensor of means": (("Add", ["x", "y"], {}), {"x": VOLUME, "y": ["n", 4, 1, 1, 1]}, {}),
    "concatenation": (("Concat", ["x", "y"], {"axis": 1}), {"x": VOLUME, "y": VOLUME}, {}),
    "range of channels": (
        ("Slice", ["x", "one", "last", "axis"], {}), {"x": VOLUME},
        {"one": np.array([1], INTS), "last": np.array([2**62], INTS), "axis": np.array([1], INTS)}),
    "one part": (("Split", ["x"], {"axis": -1, "num_outputs": 1}), {"x": TOKENS}, {}),
    "nearest": (
        ("Resize", ["x", "", "scale"], {"mode": "nearest", "nearest_mode": "floor",
         "coordinate_transformation_mode": "asymmetric"}), {"x": IMAGE}, {"scale": np.array([1, 1, 2, 3], np.float32)}),
    "linear": (
        ("Resize", ["x", "", "scale"], {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}),
        {"x": VOLUME}, {"scale": np.array([1, 1, 2, 2, 2], np.float32)}),
    "linear between corners": (
        ("Resize", ["x", "", "scale"], {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
        {"x": IMAGE}, {"scale": np.array([1, 1, 2, 2], np.float32)}),
    "mean of windows": (
        ("AveragePool", ["x"], {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2], "pads": [1] * 6,
         "count_include_pad": 0, "ceil_mode": 0}), {"x": VOLUME}, {}),
    "border": (
        ("Pad", ["x", "pads", "value"], {}), {"x": VOLUME},
        {"pads": np.array([0, 0, 1, 0, 0, 0, 0, 0, 2, 3], INTS), "value": np.float32(0.5)}),
    "spread over an axis": (("Expand", ["x", "sizes"], {}), {"x": ["n", 1, 4]}, {"sizes": np.array([1, 3, 4], INTS)}),
    "transpose": (("Transpose", ["x"], {"perm": [0, 2, 1, 3]}), {"x": IMAGE}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_every_operator(name: str, tmp_path: Path) -> None:
    (kind, read, attributes), inputs, weights = ONE[name]
    path = write(tmp_path / "one.onnx", [(kind, read, ["out"], attributes)], inputs, weights)
    draft = lower(path)
    for batch in (1, 2):
        check_draft(draft, path, drawn(inputs, batch))


SHAPES = [("Shape", ["y"], [f"s{i}"], {"start": i + 2, "end": i + 3}) for i in range(3)]


def test_sizes_are_taken_from_values(tmp_path: Path) -> None:
    """Tokens to a volume of another tensor's sizes, and a resize to them."""
    weights = {"n": np.array([0], INTS), "c": np.array([4], INTS), "flat": np.array([0, 4, -1], INTS)}
    nodes = [
        *SHAPES, ("Reshape", ["x", "flat"], ["tokens"], {}),
        ("Concat", ["n", "c", "s0", "s1", "s2"], ["sizes"], {"axis": 0}), ("Reshape", ["tokens", "sizes"], ["z"], {}),
        ("Shape", ["small"], ["front"], {"end": 2}), ("Concat", ["front", "s0", "s1", "s2"], ["large"], {"axis": 0}),
        ("Resize", ["small", "", "", "large"], ["grown"],
         {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}),
        ("Add", ["z", "grown"], ["out"], {}),
    ]  # fmt: skip
    inputs = {"x": VOLUME, "y": VOLUME, "small": ["n", 4, 2, 2, 3]}
    path = write(tmp_path / "sizes.onnx", nodes, inputs, weights)
    for batch in (1, 2):
        check_draft(lower(path), path, drawn(inputs, batch))


def test_vectors_stay_vectors(tmp_path: Path) -> None:
    """Reshaped, split, unsqueezed, projected, multiplied: nothing but `N C` is made, and pointwise spreads it."""
    nodes = [
        ("Reshape", ["row", "five"], ["r"], {}), ("Split", ["r", "widths"], ["a", "b"], {"axis": 1}),
        ("Reshape", ["constants", "three"], ["k"], {}), ("MatMul", ["k", "w"], ["kw"], {}),
        ("Split", ["kw", "widths"], ["c", "d"], {"axis": 2}), ("Sigmoid", ["row"], ["s"], {}),
        ("Mul", ["row", "s"], ["silu"], {}), ("MatMul", ["silu", "v"], ["m"], {}), ("Add", ["bias", "m"], ["p"], {}),
        ("Unsqueeze", ["p", "axis2"], ["p3"], {}), ("Unsqueeze", ["p3", "axes34"], ["p5"], {}),
        ("Squeeze", ["p5", "axes"], ["flat"], {}), ("Reshape", ["flat", "part"], ["p1"], {}),
        ("Mul", ["a", "b"], ["ab"], {}), ("Mul", ["x", "ab"], ["xa"], {}), ("Add", ["xa", "p1"], ["volume"], {}),
        ("Reshape", ["volume", "tokens"], ["t"], {}), ("Transpose", ["t"], ["tt"], {"perm": [0, 2, 1]}),
        ("Add", ["c", "tt"], ["tc"], {}), ("Mul", ["tc", "d"], ["out"], {}),
    ]  # fmt: skip
    weights = {
        "five": np.array([0, 8, 1, 1, 1], INTS), "three": np.array([0, 1, 6], INTS), "widths": np.array([4, 4], INTS),
        "axis2": np.array([2], INTS), "axes34": np.array([3, 4], INTS), "axes": np.array([2, 3, 4], INTS),
        "part": np.array([0, 4, 1, 1, 1], INTS), "tokens": np.array([0, 4, -1], INTS),
        "w": random((6, 8)), "v": random((8, 4)), "bias": random((4,)),
    }  # fmt: skip
    inputs = {"x": VOLUME, "row": ["n", 8], "constants": ["n", 6]}
    path = write(tmp_path / "vectors.onnx", nodes, inputs, weights)
    draft = lower(path)
    for batch in (1, 2):
        check_draft(draft, path, drawn(inputs, batch))
    kinds = Counter(one.kind for one in draft.operations)
    assert kinds["reshape"] == kinds["transpose"] == 1, "of the volume alone"
    assert kinds["columns"] == 4
    (product,) = (one for one in draft.operations if one.kind == "linear" and len(one.inputs) == 3)
    assert product.inputs[2] == "bias"


def test_a_spread_vector_that_something_else_reads_is_reshaped(tmp_path: Path) -> None:
    nodes = [("Reshape", ["row", "five"], ["r"], {}), ("Softmax", ["r"], ["out"], {"axis": 1})]
    path = write(tmp_path / "r.onnx", nodes, {"row": ["n", 8]}, {"five": np.array([0, 8, 1, 1], INTS)})
    check_draft(lower(path), path, drawn({"row": ["n", 8]}, 2))


def test_equal_operations_are_made_once(tmp_path: Path) -> None:
    nodes = [
        ("Sigmoid", ["x"], ["s0"], {}), ("Mul", ["s0", "x"], ["a"], {}), ("Sigmoid", ["x"], ["s1"], {}),
        ("Mul", ["x", "s1"], ["b"], {}), ("Add", ["a", "b"], ["out"], {}),
    ]  # fmt: skip
    path = write(tmp_path / "twice.onnx", nodes, {"x": VOLUME})
    draft = lower(path)
    check_draft(draft, path, drawn({"x": VOLUME}, 2))
    steps = [json.loads(one.settings["program"]) for one in draft.operations]
    assert steps == [[["silu", 0]], [["add", 0, 0]]]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_stored_in_half_precision_are_float32(dtype: Any, tmp_path: Path) -> None:
    nodes = [("Cast", ["w"], ["wide"], {"to": TensorProto.FLOAT}), ("MatMul", ["x", "wide"], ["out"], {})]
    path = write(tmp_path / "half.onnx", nodes, {"x": TOKENS}, {"w": random((4, 6)).astype(dtype)})
    draft = lower(path)
    assert [one.kind for one in draft.operations] == ["linear"]
    assert draft.weights["w"].dtype == torch.float32
    assert torch.equal(draft.weights["w"], torch.from_numpy(random((4, 6)).astype(dtype).astype(np.float32)))
    check_draft(draft, path, drawn({"x": TOKENS}, 2))


def test_an_output_that_is_an_input_is_copied(tmp_path: Path) -> None:
    path = write(tmp_path / "same.onnx", [("Identity", ["x"], ["out"], {})], {"x": VOLUME})
    draft = lower(path)
    check_draft(draft, path, drawn({"x": VOLUME}, 2))
    assert draft.outputs == ("out",)


@pytest.mark.parametrize(
    ("node", "inputs", "weights", "reason"),
    [
        (("ReduceMean", ["x"], {}), {"x": VOLUME}, {}, "this operator has none"),
        (("Conv", ["x", "y"], {}), {"x": VOLUME, "y": [4, 4, 1, 1, 1]}, {}, "its weight is computed"),
        (("Conv", ["x", "w"], {"pads": [0, 1]}), {"x": SIGNAL}, {"w": random((4, 4, 3))}, "before and after"),
        (("Add", ["x", "y"], {}), {"x": VOLUME, "y": ["n", 1, "d", "h", "w"]}, {}, "beside"),
        (("Add", ["x", "w"], {}), {"x": VOLUME}, {"w": random((6,))}, "beside"),
        (("Gather", ["x", "w"], {"axis": 0}), {"x": VOLUME}, {"w": np.array(0, INTS)}, "an index into channels"),
        (("Split", ["x", "w"], {"axis": 2}), {"x": ["n", 4, 6, 6]}, {"w": np.array([6], INTS)}, "not of the channels"),
        (("Split", ["x"], {"axis": 2, "num_outputs": 1}), {"x": VOLUME}, {}, "1 equal parts of a free size"),
        (("Cast", ["x"], {"to": TensorProto.FLOAT16}), {"x": VOLUME}, {}, "another type than float"),
        (("Pad", ["x", "w"], {"mode": "edge"}), {"x": VOLUME}, {"w": np.array([0] * 10, INTS)}, "constant border"),
        (("LayerNormalization", ["x", "w"], {"axis": -1}), {"x": VECTOR}, {"w": random((4,))}, "a norm over axis"),
        (("Resize", ["x", "", "w"], {"mode": "cubic", "coordinate_transformation_mode": "half_pixel"}), {"x": IMAGE},
         {"w": np.array([1, 1, 2, 2], np.float32)}, "mode cubic"),
    ],
)  # fmt: skip
def test_what_no_device_operation_does_is_refused(
    node: tuple, inputs: dict, weights: dict, reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "refused.onnx", [(node[0], node[1], ["out"], node[2])], inputs, weights)
    message = rf"^\[build\] {node[0]} out: no device operation: .*{reason}.*; use another engine \(--engine onnxruntime\)$"
    with pytest.raises(ValueError, match=message):
        lower(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "decode", "encode"])
def test_the_bundled_model(name: str, default_artifact_folder: Path) -> None:
    spec = read_artifact(default_artifact_folder)
    program = spec.programs[name]  # type: ignore[index]
    path = default_artifact_folder / program.file
    draft = lower(path)
    assert draft.inputs == tuple(tensor.name for tensor in program.inputs)
    assert draft.outputs == tuple(tensor.name for tensor in program.outputs)
    assert all(weight.dtype == torch.float32 for weight in draft.weights.values())
    for batch, large in ((1, "0"), (2, "12")):
        check_draft(draft, path, program_inputs(spec, program, batch, large))
