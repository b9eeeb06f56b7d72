"""The ONNX form of the aten operators that PyTorch's autograd adds to a captured network: below the level of
`onnx_operators`, with the statistics of norms as outputs, and backward."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, prod, sqrt
from typing import Any

import numpy as np
from onnx_ir import DataType
from torch.fx import Node

from .graph import argument, aten, is_free, parameter, shape_of
from .onnx_operators import OPERATORS
from .onnx_writer import OnnxWriter

Operator = Callable[[OnnxWriter, Node], Any]


def _refused(n: Node, why: str) -> ValueError:
    return ValueError(f"[to_onnx] {n.target} {why} has no ONNX form here")


def _number(w: OnnxWriter, value: float) -> Any:
    return w.constant(value, np.float32)


def _product(w: OnnxWriter, n: Node) -> Any:
    return w.emit("MatMul", w.tensor(argument(n, 0)), w.tensor(argument(n, 1)))


def _added_product(w: OnnxWriter, n: Node) -> Any:
    if n.kwargs:
        raise _refused(n, f"with {dict(n.kwargs)}")
    product = w.emit("MatMul", w.tensor(argument(n, 1)), w.tensor(argument(n, 2)))
    return w.emit("Add", product, w.tensor(argument(n, 0)))


def _convolution(w: OnnxWriter, n: Node) -> Any:
    if argument(n, 6):
        raise _refused(n, "transposed")
    inputs = [w.tensor(argument(n, index)) for index in range(3)]
    strides, padding, dilations = (list(argument(n, index)) for index in (3, 4, 5))
    return w.emit(
        "Conv", *inputs, strides=strides, pads=padding + padding, dilations=dilations, group=argument(n, 8)
    )


def _convolution_backward(w: OnnxWriter, n: Node) -> Any:
    """By x alone: the weights of a trained classifier have no gradient."""
    if argument(n, 7) or list(argument(n, 10))[1:] != [False, False]:
        raise _refused(n, "transposed, or by its weights")
    strides, padding, dilations = (list(argument(n, index)) for index in (4, 5, 6))
    sizes = shape_of(argument(n, 1))[2:]
    made = shape_of(argument(n, 0))[2:]
    if any(is_free(size) for size in (*sizes, *made)):
        raise _refused(n, "with free spatial sizes")
    kernel = shape_of(argument(n, 2))[2:]
    # What a strided convolution has left out at the far end gets no gradient, but has its place.
    left = [
        int(size) - ((int(out) - 1) * s - 2 * p + d * (int(k) - 1) + 1)
        for size, out, s, p, d, k in zip(sizes, made, strides, padding, dilations, kernel, strict=True)
    ]
    grad, weight = w.tensor(argument(n, 0)), w.tensor(argument(n, 2))
    moved = w.emit(
        "ConvTranspose", grad, weight, strides=strides, pads=padding + padding, dilations=dilations,
        output_padding=left, group=argument(n, 9),
    )  # fmt: skip
    return [moved, None, None]


def _statistics(w: OnnxWriter, x: Any, epsilon: float) -> list[Any]:
    """Mean and 1 / sqrt(variance + epsilon) along the last axis, which is kept."""
    axes = w.constant([-1])
    mean = w.emit("ReduceMean", x, axes)
    off = w.emit("Sub", x, mean)
    variance = w.emit("ReduceMean", w.emit("Mul", off, off), axes)
    deviation = w.emit("Sqrt", w.emit("Add", variance, _number(w, epsilon)))
    return [mean, w.emit("Reciprocal", deviation)]


def _norm_backward(w: OnnxWriter, grad: Any, x: Any, mean: Any, inverse: Any) -> Any:
    """grad by x of (x - mean) inverse, both of which depend on x, along the last axis."""
    axes = w.constant([-1])
    normal = w.emit("Mul", w.emit("Sub", x, mean), inverse)
    along = w.emit("Mul", normal, w.emit("ReduceMean", w.emit("Mul", grad, normal), axes))
    rest = w.emit("Sub", w.emit("Sub", grad, w.emit("ReduceMean", grad, axes)), along)
    return w.emit("Mul", rest, inverse)


def _read(n: Node, *places: int) -> bool:
    """Whether anybody reads one of these outputs."""
    return any(user.args[1] in places for user in n.users)


def _group_norm(w: OnnxWriter, n: Node) -> Any:
    x, scale, bias = (w.tensor(argument(n, index)) for index in range(3))
    channels, groups, epsilon = int(argument(n, 4)), argument(n, 6), argument(n, 7)
    scale = _ones(w, channels) if scale is None else scale
    bias = w.constant(np.zeros(channels), np.float32) if bias is None else bias
    found = [w.emit("GroupNormalization", x, scale, bias, num_groups=groups, epsilon=epsilon)]
    if _read(n, 1, 2):
        found += _statistics(w, w.emit("Reshape", x, w.constant([0, groups, -1])), epsilon)
    return found


def _group_norm_backward(w: OnnxWriter, n: Node) -> Any:
    if list(argument(n, 9))[1:] != [False, False]:
        raise _refused(n, "by its weights")
    grad, x, mean, inverse = (w.tensor(argument(n, index)) for index in range(4))
    groups = w.constant([0, argument(n, 8), -1])
    if argument(n, 4) is not None:
        weight = parameter(w.program, argument(n, 4)).detach().numpy()
        shaped = weight.reshape(-1, *[1] * (len(shape_of(argument(n, 1))) - 2))
        grad = w.emit("Mul", grad, w.constant(shaped, np.float32))
    flat = [w.emit("Reshape", value, groups) for value in (grad, x)]
    moved = _norm_backward(w, flat[0], flat[1], mean, inverse)
    # The batch alone may be free.
    shape = [0, *(int(size) for size in shape_of(argument(n, 1))[1:])]
    return [w.emit("Reshape", moved, w.constant(shape)), None, None]


def _layer_norm(w: OnnxWriter, n: Node) -> Any:
    if len(argument(n, 1)) != 1:
        raise _refused(n, "over several axes")
    x, scale, bias = (w.tensor(argument(n, index)) for index in (0, 2, 3))
    scale = _ones(w, argument(n, 1)[0]) if scale is None else scale
    found = [w.emit("LayerNormalization", x, scale, bias, axis=-1, epsilon=argument(n, 4))]
    return found + (_statistics(w, x, argument(n, 4)) if _read(n, 1, 2) else [])


def _layer_norm_backward(w: OnnxWriter, n: Node) -> Any:
    if list(argument(n, 7))[1:] != [False, False] or len(argument(n, 2)) != 1:
        raise _refused(n, "by its weights, or over several axes")
    grad, x, mean, inverse, weight = (w.tensor(argument(n, index)) for index in (0, 1, 3, 4, 5))
    grad = grad if weight is None else w.emit("Mul", grad, weight)
    return [_norm_backward(w, grad, x, mean, inverse), None, None]


def _ones(w: OnnxWriter, count: int) -> Any:
    return w.constant(np.ones(int(count)), np.float32)


def _silu_backward(w: OnnxWriter, n: Node) -> Any:
    """g s (1 + x (1 - s)), s = sigmoid(x)."""
    grad, x = w.tensor(argument(n, 0)), w.tensor(argument(n, 1))
    s = w.emit("Sigmoid", x)
    bend = w.emit("Add", w.emit("Mul", x, w.emit("Sub", _number(w, 1), s)), _number(w, 1))
    return w.emit("Mul", grad, w.emit("Mul", s, bend))


def _gelu_backward(w: OnnxWriter, n: Node) -> Any:
    """g (Phi(x) + x phi(x)), Phi and phi the standard normal's distribution and density."""
    if n.kwargs.get("approximate", "none") != "none":
        raise _refused(n, f"with {dict(n.kwargs)}")
    grad, x = w.tensor(argument(n, 0)), w.tensor(argument(n, 1))
    error = w.emit("Erf", w.emit("Mul", x, _number(w, sqrt(0.5))))
    below = w.emit("Mul", w.emit("Add", error, _number(w, 1)), _number(w, 0.5))
    density = w.emit("Exp", w.emit("Mul", w.emit("Mul", x, x), _number(w, -0.5)))
    slope = w.emit("Mul", x, w.emit("Mul", density, _number(w, 1 / sqrt(2 * pi))))
    return w.emit("Mul", grad, w.emit("Add", below, slope))


def _threshold_backward(w: OnnxWriter, n: Node) -> Any:
    above = w.emit("Greater", w.tensor(argument(n, 1)), _number(w, argument(n, 2)))
    return w.emit("Mul", w.tensor(argument(n, 0)), w.emit("Cast", above, to=DataType.FLOAT.value))


def _softmax(kind: str) -> Operator:
    return lambda w, n: w.emit(kind, w.tensor(argument(n, 0)), axis=argument(n, 1))


def _softmax_backward(w: OnnxWriter, n: Node) -> Any:
    grad, out = w.tensor(argument(n, 0)), w.tensor(argument(n, 1))
    total = w.emit("ReduceSum", w.emit("Mul", grad, out), w.constant([argument(n, 2)]))
    return w.emit("Mul", w.emit("Sub", grad, total), out)


def _log_softmax_backward(w: OnnxWriter, n: Node) -> Any:
    grad, out = w.tensor(argument(n, 0)), w.tensor(argument(n, 1))
    total = w.emit("ReduceSum", grad, w.constant([argument(n, 2)]))
    return w.emit("Sub", grad, w.emit("Mul", w.emit("Exp", out), total))


def _average_pool_backward(w: OnnxWriter, n: Node) -> Any:
    """Of a pool whose windows tile the image: each shares its gradient out evenly."""
    kernel = list(argument(n, 2))
    strides = list(argument(n, 3) or kernel)
    sizes, made = shape_of(argument(n, 1))[2:], shape_of(argument(n, 0))[2:]
    if (
        strides != kernel
        or any(argument(n, 4))
        or [int(o) * k for o, k in zip(made, kernel, strict=True)] != [*sizes]
    ):
        raise _refused(n, "with windows that overlap or leave something out")
    grad = w.emit("Mul", w.tensor(argument(n, 0)), _number(w, 1 / prod(kernel)))
    scales = w.constant([1.0, 1.0, *kernel], np.float32)
    return w.emit("Resize", grad, None, scales, mode="nearest", nearest_mode="floor",
                  coordinate_transformation_mode="asymmetric")  # fmt: skip


def _reduced(kind: str) -> Operator:
    def write(w: OnnxWriter, n: Node) -> Any:
        axes = w.constant(list(argument(n, 1)))
        return w.emit(kind, w.tensor(argument(n, 0)), axes, keepdims=int(argument(n, 2, False)))

    return write


GRADIENT_OPERATORS: dict[Any, Operator] = {
    **OPERATORS,
    aten.t.default: lambda w, n: w.emit("Transpose", w.tensor(argument(n, 0)), perm=[1, 0]),
    aten.mm.default: _product,
    aten.addmm.default: _added_product,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.silu_backward.default: _silu_backward,
    aten.gelu_backward.default: _gelu_backward,
    aten.threshold_backward.default: _threshold_backward,
    aten._softmax.default: _softmax("Softmax"),
    aten._log_softmax.default: _softmax("LogSoftmax"),
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.avg_pool2d_backward.default: _average_pool_backward,
    aten.avg_pool3d_backward.default: _average_pool_backward,
    aten.sum.dim_IntList: _reduced("ReduceSum"),
    aten.mean.dim: _reduced("ReduceMean"),
    aten.div.Scalar: OPERATORS[aten.div.Tensor],
}
