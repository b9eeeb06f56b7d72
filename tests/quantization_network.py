"""A small network with every kind of layer that is quantised, by hand, and an artifact around it.

x -> in -> norm, silu -> a -> norm -> b -> + in -> up (transposed) -> down to a product over channels -> y, with a 1^3 `skip`
that a Transpose moves.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 16


def network() -> onnx.ModelProto:
    """float32 `x` `[batch, 4, d0, d1, d2]` to `y` of the same shape."""
    generator = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {}

    def weight(name: str, *shape: int) -> str:
        fan = int(np.prod(shape)) // shape[1 if name == "w_up" or len(shape) == 2 else 0]
        constants[name] = (generator.standard_normal(shape) / fan**0.5).astype(np.float32)
        return name

    def norm(value: str, name: str) -> onnx.NodeProto:
        constants[f"{name}_scale"] = np.linspace(0.5, 1.5, CHANNELS, dtype=np.float32)
        constants[f"{name}_bias"] = np.linspace(-0.5, 0.5, CHANNELS, dtype=np.float32)
        read = [value, f"{name}_scale", f"{name}_bias"]
        return helper.make_node("GroupNormalization", read, [name], num_groups=4, epsilon=1e-5)

    cube, pads = [3, 3, 3], [1] * 6
    nodes = [
        helper.make_node("Conv", ["x", weight("w_in", CHANNELS, 4, 3, 3, 3)], ["in"], pads=pads, kernel_shape=cube),
        norm("in", "norm_in"),
        helper.make_node("Sigmoid", ["norm_in"], ["gate"]),
        helper.make_node("Mul", ["norm_in", "gate"], ["act"]),
        helper.make_node("Conv", ["act", weight("w_a", CHANNELS, CHANNELS, 3, 3, 3)], ["a"], pads=pads, kernel_shape=cube),
        norm("a", "norm_a"),
        helper.make_node("Conv", ["norm_a", weight("w_b", CHANNELS, CHANNELS, 3, 3, 3)], ["b"], pads=pads, kernel_shape=cube),
        helper.make_node("Add", ["b", "in"], ["sum"]),
        helper.make_node("ConvTranspose", ["sum", weight("w_up", CHANNELS, CHANNELS, 4, 4, 4)], ["up"], pads=pads, strides=[2] * 3),
        helper.make_node("AveragePool", ["up"], ["down"], kernel_shape=[2] * 3, strides=[2] * 3),
        helper.make_node("Conv", ["down", weight("w_skip", CHANNELS, CHANNELS, 1, 1, 1)], ["skip"], kernel_shape=[1] * 3),
        helper.make_node("Transpose", ["skip"], ["tokens"], perm=[0, 2, 3, 4, 1]),
        helper.make_node("MatMul", ["tokens", weight("w_product", CHANNELS, CHANNELS)], ["product"]),
        helper.make_node("Transpose", ["product"], ["volume"], perm=[0, 4, 1, 2, 3]),
        helper.make_node("Conv", ["volume", weight("w_out", 4, CHANNELS, 3, 3, 3)], ["y"], pads=pads, kernel_shape=cube),
    ]  # fmt: skip
    shape = ["batch", 4, "d0", "d1", "d2"]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model
