"""Quantised programs: which layers, where the pairs stand, what they compute, against NumPy and ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from quantization_network import network

from volcast.export import qdq
from volcast.export.bias_correction import corrected, corrected_inputs
from volcast.export.calibration import Eyes, with_eyes
from volcast.export.qdq import activations, int8_weights, layers, quantized, save


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})


def sample(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 4, 4, 4, 4), np.float32)


def largest(model: onnx.ModelProto, names: tuple[str, ...], x: np.ndarray) -> dict[str, float]:
    """By ONNX Runtime's own values."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return {name: float(np.abs(value).max()) for name, value in zip(names, run(shown, x)[1:], strict=True)}


@pytest.fixture(scope="module")
def rounded() -> onnx.ModelProto:
    model = network()
    chosen = layers(model, residuals=True)
    return quantized(model, chosen, largest(model, activations(chosen), sample()))


def test_inner_layers_are_chosen_and_the_first_and_last_are_not() -> None:
    model = network()
    chosen = {model.graph.node[each.node].output[0]: each for each in layers(model, residuals=True)}
    assert chosen.keys() == {"a", "b", "skip", "up", "product"}
    # Of a transposed convolution's [C, K, ...] and a product's [C, K] weights, axis 1 counts the results.
    assert {name: each.axis for name, each in chosen.items()} == {
        "a": 0,
        "b": 0,
        "skip": 0,
        "up": 1,
        "product": 1,
    }
    # `skip` is moved by a Transpose, which ONNX Runtime does not survive.
    assert {name for name, each in chosen.items() if each.result} == {"a", "b"}
    strict = layers(model, residuals=False)
    assert {each.result for each in strict} == {"a", None}


def test_a_program_of_first_and_last_layers_has_none() -> None:
    model = network()
    # Without its middle: in -> norm -> out.
    nodes = [node for node in model.graph.node if node.output[0] in ("in", "y")]
    nodes[-1].input[0] = "in"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert layers(model, residuals=True) == ()


def test_pairs_stand_on_what_quantised_layers_read_and_nowhere_else(rounded: onnx.ModelProto) -> None:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in rounded.graph.initializer}
    made = {node.output[0]: node for node in rounded.graph.node}
    for node in rounded.graph.node:
        sources = [made[name].op_type if name in made else "" for name in node.input]
        if node.output[0] in ("in", "y"):
            assert "DequantizeLinear" not in sources
        elif node.op_type in ("Conv", "ConvTranspose", "MatMul"):
            assert sources[:2] == ["DequantizeLinear", "DequantizeLinear"], node.output[0]
            weight = made[node.input[1]]
            values, scale, zero = (constants[name] for name in weight.input)
            assert values.dtype == np.int8 and values.min() >= -127 and not zero.any()
            axis = next(each.i for each in weight.attribute if each.name == "axis")
            assert scale.shape == zero.shape == (values.shape[axis],)
            activation = made[node.input[0]]
            assert constants[activation.input[1]].shape == () and constants[activation.input[2]] == np.int8(0)
        elif node.op_type == "GroupNormalization":
            # What a norm reads beside its input (scale, bias) is float32, and what it gives is read as float32 too.
            assert all(name in constants and constants[name].dtype == np.float32 for name in node.input[1:])
    pairs = [node.input[0] for node in rounded.graph.node if node.op_type == "QuantizeLinear"]
    assert len(pairs) == len(set(pairs)), "one pair a value, however many layers read it"
    # The residual stream keeps float32 beside the layer that reads it rounded.
    add = next(node for node in rounded.graph.node if node.output[0] == "sum")
    assert add.input[1] == "in"


def test_weights_are_rounded_to_half_a_step_a_channel() -> None:
    values = np.random.default_rng(3).standard_normal((5, 7, 3, 3, 3)).astype(np.float32)
    values[2] = 0
    for axis in (0, 1):
        stored, scale = int8_weights(values, axis)
        others = tuple(each for each in range(5) if each != axis)
        np.testing.assert_allclose(scale, np.where(np.abs(values).max(axis=others) == 0, 1, np.abs(values).max(axis=others) / 127), rtol=2**-23)  # fmt: skip
        shape = [-1 if each == axis else 1 for each in range(5)]
        step = scale.astype(np.float64).reshape(shape)
        # Half a step, and the float32 rounding of the scale on 127 of them.
        assert (np.abs(stored * step - values) <= step * (0.5 + 127 * 2**-24)).all()
        assert (np.abs(stored).max(axis=others)[scale < 1] == 127).all()


def test_what_is_computed_is_the_rounded_network(rounded: onnx.ModelProto) -> None:
    """ONNX Runtime on the pairs against NumPy's rounding of the same values, at the layer `a`."""
    model, x = network(), sample()
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend([onnx.ValueInfoProto(name="act"), onnx.ValueInfoProto(name="a")])
    act, a = run(shown, x)[1:]
    step = np.abs(act).max() / 127
    inputs = (np.clip(np.rint(act / step), -127, 127) * step).astype(np.float32)
    weight = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "w_a")
    stored, scale = int8_weights(weight, 0)
    for tensor in shown.graph.initializer:
        if tensor.name == "w_a":
            tensor.CopyFrom(
                numpy_helper.from_array((stored * scale.reshape(-1, 1, 1, 1, 1)).astype(np.float32), "w_a")
            )
    node = next(node for node in shown.graph.node if node.output[0] == "a")
    node.input[0] = "given"
    shown.graph.input.append(
        onnx.helper.make_tensor_value_info("given", TensorProto.FLOAT, list(inputs.shape))
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options)
    wanted = session.run(["a"], {"x": x, "given": inputs})[0]
    wanted = np.clip(np.rint(wanted / (np.abs(a).max() / 127)), -128, 127) * (np.abs(a).max() / 127)
    rounded_and_shown = onnx.ModelProto()
    rounded_and_shown.CopyFrom(rounded)
    rounded_and_shown.graph.output.append(onnx.ValueInfoProto(name="a/rounded"))
    found = run(rounded_and_shown, x)[1]
    # The same integers but where a sum falls between two: at most one step apart, and rarely.
    apart = np.abs(found - wanted) / (np.abs(a).max() / 127)
    assert apart.max() < 1.01 and (apart > 0.5).mean() < 0.01


def test_the_rounded_network_is_near_the_network(rounded: onnx.ModelProto) -> None:
    x = sample()
    wanted, found = run(network(), x)[0], run(rounded, x)[0]
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    # A value is off by step / sqrt(12) = largest / 440; with a largest of 4 deviations that is 0.9 %, for the inputs,
    # weights and results of five layers: sqrt(15) 0.9 % = 3.5 %, and never 0.
    assert 1e-4 < error < 0.035


def shown(model: onnx.ModelProto, names: tuple[str, ...], x: np.ndarray) -> dict[str, np.ndarray]:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return dict(zip(names, run(result, x)[1:], strict=True))


def test_eyes_see_the_largest_magnitude_and_the_means() -> None:
    model, x = network(), sample(5)
    chosen = layers(model, residuals=True)
    eyes = Eyes(largest=activations(chosen), mean=corrected_inputs(model, chosen))
    assert eyes.mean == dict.fromkeys(["act", "norm_a", "sum", "down"], 5)
    seen = run(with_eyes(model, eyes), x)[1:]
    split = len(eyes.largest)
    assert dict(zip(eyes.largest, map(float, seen), strict=False)) == largest(model, eyes.largest, x)
    for value, found in zip(shown(model, tuple(eyes.mean), x).values(), seen[split:], strict=True):
        # float32 sums of 64 numbers in another order.
        np.testing.assert_allclose(found, value.mean(axis=(0, 2, 3, 4)), rtol=1e-5, atol=1e-6)


def test_biases_take_back_what_rounded_weights_shift() -> None:
    """On an input that is its mean everywhere the rounded weights give the float32 result, but at the edges."""
    model = network()
    chosen = layers(model, residuals=True)
    means = {name: np.linspace(-1, 2, 16) for name in corrected_inputs(model, chosen)}
    fixed = corrected(model, chosen, means)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in fixed.graph.initializer}
    for layer in (each for each in chosen if each.input in means):
        node = fixed.graph.node[layer.node]
        weight = constants[layer.weight].astype(np.float64)
        stored, scale = int8_weights(constants[layer.weight], layer.axis)
        rounded = stored * scale.astype(np.float64).reshape([-1 if a == layer.axis else 1 for a in range(5)])
        filled = torch.from_numpy(means[layer.input]).reshape(1, 16, 1, 1, 1).expand(1, 16, 7, 7, 7)
        function = F.conv_transpose3d if node.op_type == "ConvTranspose" else F.conv3d
        stride = 2 if node.op_type == "ConvTranspose" else 1
        exact = function(filled, torch.from_numpy(weight), stride=stride)
        found = function(
            filled,
            torch.from_numpy(rounded),
            torch.tensor(constants[node.input[2]]).double(),
            stride=stride,
        )
        edge = 3 if node.op_type == "ConvTranspose" else 0
        inner = (0, slice(None), *(slice(edge, size - edge) for size in exact.shape[2:]))
        apart = (found - exact)[inner].mean(dim=(1, 2, 3)).abs().max()
        # The bias is float32, and the shift without it some thousandths.
        assert apart < 1e-6 and np.abs(constants[node.input[2]]).max() > 1e-4


def test_large_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdq, "EXTERNAL_BYTES", 100)
    save(network(), tmp_path / "step.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.onnx", "step.onnx.data"]
    np.testing.assert_array_equal(
        run(onnx.load(tmp_path / "step.onnx"), sample())[0], run(network(), sample())[0]
    )
