"""The device operation of every ONNX operator that `onnx_writer` emits for a step, a decoder or an encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto

from .lower_shapes import SHAPE_OPERATORS
from .lowering import Lowering, Operator, Shape, attributes, refused


def _elementwise(step: str) -> Operator:
    return lambda w, n: w.elementwise(n, step, *n.input)


def _add(w: Lowering, n: NodeProto) -> None:
    """A product's bias goes into the product."""
    for product, bias in (tuple(n.input), tuple(reversed(n.input))):
        made = w.made_by(product)
        if made is None or made.kind != "linear" or len(made.inputs) != 2 or not w.is_weight(bias):
            continue
        if w.shapes[bias] == w.shapes[product][-1:] and w.readers[product] == 1:
            w.emit(n.output[0], "linear", [*made.inputs, w.weight(bias)], w.shapes[product])
            return
    w.elementwise(n, "add", *n.input)


def _mul(w: Lowering, n: NodeProto) -> None:
    """x * sigmoid(x) is silu."""
    for x, gate in (tuple(n.input), tuple(reversed(n.input))):
        node = w.node_of.get(gate)
        if node is not None and node.op_type == "Sigmoid" and node.input[0] == x:
            w.elementwise(n, "silu", x)
            return
    w.elementwise(n, "mul", *n.input)


def _clip(w: Lowering, n: NodeProto) -> None:
    bounds = [w.number(name) if name else None for name in [*n.input[1:], "", ""][:2]]
    w.elementwise(n, "clamp", n.input[0], arguments=bounds)


def _gelu(w: Lowering, n: NodeProto) -> None:
    tanh = attributes(n).get("approximate", b"none") == b"tanh"
    w.elementwise(n, "gelu_tanh" if tanh else "gelu", n.input[0])


def _leaky_relu(w: Lowering, n: NodeProto) -> None:
    w.elementwise(n, "leaky_relu", n.input[0], arguments=[attributes(n).get("alpha", 0.01)])


def _window(w: Lowering, n: NodeProto) -> dict[str, list[int]]:
    """The settings of a convolution; one number an axis."""
    given, axes = attributes(n), len(w.shapes[n.input[1]]) - 2
    return {
        "stride": list(given.get("strides", [1] * axes)),
        "padding": _symmetric(n, list(given.get("pads", [0] * 2 * axes))),
        "dilation": list(given.get("dilations", [1] * axes)),
        "groups": given.get("group", 1),
    }


def _symmetric(n: NodeProto, pads: list[int]) -> list[int]:
    half = len(pads) // 2
    if pads[:half] != pads[half:]:
        raise refused(n, f"padding {pads} differs before and after")
    return pads[:half]


def _weighted(w: Lowering, n: NodeProto) -> list[str | None]:
    if not all(w.is_weight(name) for name in n.input[1:] if name):
        raise refused(n, "its weight is computed")
    return [w.value(name) if name else None for name in n.input]


def _convolution(w: Lowering, n: NodeProto) -> None:
    x, weight = w.shapes[n.input[0]], w.shapes[n.input[1]]
    window = _window(w, n)
    shape = _moved(x, weight[0], window["stride"], window["padding"], window["dilation"], list(weight[2:]))
    w.emit(n.output[0], "convolution", _weighted(w, n), shape, **window)


def _moved(x: Shape, channels: int | None, stride: Any, padding: Any, dilation: Any, kernel: Any) -> Shape:
    """The shape that a window leaves."""
    sizes = [
        None if size is None else (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, s, p, d, k in zip(x[2:], stride, padding, dilation, kernel, strict=True)
    ]
    return (x[0], channels, *sizes)


def _transposed_convolution(w: Lowering, n: NodeProto) -> None:
    x, weight = w.shapes[n.input[0]], w.shapes[n.input[1]]
    window = _window(w, n)
    extra = list(attributes(n).get("output_padding", [0] * (len(weight) - 2)))
    sizes = [
        None if size is None else (size - 1) * s - 2 * p + d * ((k or 1) - 1) + e + 1
        for size, s, p, d, k, e in zip(
            x[2:], window["stride"], window["padding"], window["dilation"], weight[2:], extra, strict=True
        )
    ]
    channels = (weight[1] or 0) * attributes(n).get("group", 1)
    w.emit(
        n.output[0], "transposed_convolution", _weighted(w, n), (x[0], channels, *sizes),
        **window, output_padding=extra,
    )  # fmt: skip


def _group_norm(w: Lowering, n: NodeProto) -> None:
    given = attributes(n)
    settings = {"groups": given["num_groups"], "eps": _eps(given), "activation": "none"}
    w.emit(n.output[0], "group_norm", _weighted(w, n), w.shapes[n.input[0]], **settings)


def _layer_norm(w: Lowering, n: NodeProto) -> None:
    given, shape = attributes(n), w.shapes[n.input[0]]
    if len(shape) != 3 or given.get("axis", -1) not in (-1, 2):
        raise refused(n, f"a norm over axis {given.get('axis', -1)} of {len(shape)}")
    inputs = _weighted(w, n)
    if len(inputs) == 2 or inputs[2] is None:
        zeros = w.weight(f"{n.output[0]}.bias", np.zeros(w.array(n.input[1]).shape))
        inputs = [*inputs[:2], zeros]
    w.emit(n.output[0], "layer_norm", inputs, shape, eps=_eps(given))


def _eps(given: dict[str, Any]) -> float:
    """ONNX stores float32: 1e-6 comes back as 9.99999997e-07."""
    return round(float(given.get("epsilon", 1e-5)), 12)


def _matmul(w: Lowering, n: NodeProto) -> None:
    a, b = n.input
    before, weight = w.shapes[a], w.shapes[b]
    if w.is_weight(b) and len(weight) == 2 and len(before) <= 3 and not w.is_weight(a):
        shape = (*before[:-1], weight[1])
        axis = w.vector_axis(a)
        if axis is not None and axis == len(before) - 1:
            vector, _ = w.vector(a) or ("", 0)
            made = w.emit(f"{n.output[0]}.vector", "linear", [vector, w.weight(b)], (shape[0], shape[-1]))
            w.spread(n.output[0], made, axis, shape)
        else:
            w.emit(n.output[0], "linear", [w.value(a), w.weight(b)], shape)
        return
    if min(len(before), len(weight)) < 2:
        raise refused(n, "a product with a vector")
    longest = max(before[:-2], weight[:-2], key=len)
    w.emit(n.output[0], "matmul", [w.value(a), w.value(b)], (*longest, before[-2], weight[-1]))


def _einsum(w: Lowering, n: NodeProto) -> None:
    equation = attributes(n)["equation"].decode().replace(" ", "")
    if "..." in equation or "->" not in equation:
        raise refused(n, f"equation {equation}")
    terms, result = equation.split("->")
    known = {
        letter: size
        for term, name in zip(terms.split(","), n.input, strict=True)
        for letter, size in zip(term, w.shapes[name], strict=True)
    }
    shape = tuple(known[letter] for letter in result)
    w.emit(n.output[0], "einsum", [w.value(name) for name in n.input], shape, equation=equation)


def _softmax(w: Lowering, n: NodeProto) -> None:
    shape = w.shapes[n.input[0]]
    w.emit(
        n.output[0], "softmax", [w.value(n.input[0])], shape, axis=attributes(n).get("axis", -1) % len(shape)
    )


def _resize(w: Lowering, n: NodeProto) -> None:
    given, shape = attributes(n), w.shapes[n.input[0]]
    mode, where = given["mode"].decode(), given["coordinate_transformation_mode"].decode()
    known = {
        ("nearest", "asymmetric"): False,
        ("linear", "half_pixel"): False,
        ("linear", "align_corners"): True,
    }
    if (mode, where) not in known:
        raise refused(n, f"mode {mode} {where}")
    settings = {"mode": mode, "align_corners": known[mode, where]}
    if n.input[2]:
        scale = [float(one) for one in w.array(n.input[2])[2:]]
        sizes = [None if s is None else int(s * one) for s, one in zip(shape[2:], scale, strict=True)]
        w.emit(n.output[0], "resize", [w.value(n.input[0])], (*shape[:2], *sizes), scale=scale, **settings)
        return
    wanted = (w.sizes(n.input[3]) or [])[2:]
    like = {size[0] for size in wanted if isinstance(size, tuple)}
    if len(like) != 1 or [size[1] for size in wanted if isinstance(size, tuple)] != list(
        range(2, len(shape))
    ):
        raise refused(n, "need the sizes of one tensor")
    free = (None,) * len(wanted)
    w.emit(
        n.output[0], "resize", [w.value(n.input[0]), like.pop()], (*shape[:2], *free), scale=None, **settings
    )


def _average_pool(w: Lowering, n: NodeProto) -> None:
    given, x = attributes(n), w.shapes[n.input[0]]
    kernel = list(given["kernel_shape"])
    stride = list(given.get("strides", [1] * len(kernel)))
    padding = _symmetric(n, list(given.get("pads", [0] * 2 * len(kernel))))
    if any(one != 1 for one in given.get("dilations", [1])):
        raise refused(n, "dilation")
    ceil = bool(given.get("ceil_mode", 0))
    shape = _moved(x, x[1], stride, padding, [1] * len(kernel), kernel)
    free = (*shape[:2], *[None] * len(kernel)) if ceil else shape
    w.emit(
        n.output[0], "average_pool", [w.value(n.input[0])], free, kernel=kernel, stride=stride, padding=padding,
        ceil_mode=ceil, count_include_pad=bool(given.get("count_include_pad", 0)),
    )  # fmt: skip


def _pad(w: Lowering, n: NodeProto) -> None:
    """ONNX lists all befores and then all afters, torch (before, after) from the last axis on."""
    if attributes(n).get("mode", b"constant") != b"constant" or len(n.input) > 3 and n.input[3]:
        raise refused(n, "need a constant border of every axis")
    shape = w.shapes[n.input[0]]
    pads = w.array(n.input[1]).tolist()
    pairs = list(zip(pads[: len(shape)], pads[len(shape) :], strict=True))
    value = w.number(n.input[2]) if len(n.input) > 2 and n.input[2] else 0.0
    padded = tuple(
        None if size is None else size + sum(pair) for size, pair in zip(shape, pairs, strict=True)
    )
    widths = [one for pair in reversed(pairs) for one in pair]
    w.emit(n.output[0], "pad", [w.value(n.input[0])], padded, widths=widths, value=value)


OPERATORS: dict[str, Operator] = {
    **SHAPE_OPERATORS,
    "Add": _add,
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Cos": _elementwise("cos"),
    "Div": _elementwise("div"),
    "Einsum": _einsum,
    "Exp": _elementwise("exp"),
    "Gelu": _gelu,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky_relu,
    "MatMul": _matmul,
    "Mul": _mul,
    "Neg": _elementwise("neg"),
    "Pad": _pad,
    "Relu": _elementwise("relu"),
    "Resize": _resize,
    "Sigmoid": _elementwise("sigmoid"),
    "Sin": _elementwise("sin"),
    "Softmax": _softmax,
    "Sqrt": _elementwise("sqrt"),
    "Sub": _elementwise("sub"),
}
