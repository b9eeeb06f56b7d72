"""The ONNX (opset 21) form of every aten operator that MONAI's generative networks are made of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import numpy as np
from torch.fx import Node

from .capture import CASTS
from .graph import argument, aten, is_free, is_parameter, parameter, shape_of
from .onnx_writer import OnnxWriter, onnx_dtype, reshape_sizes

Operator = Callable[[OnnxWriter, Node], Any]


def _unary(kind: str, **attributes: Any) -> Operator:
    return lambda w, n: w.emit(kind, w.tensor(argument(n, 0)), **attributes)


def _binary(kind: str) -> Operator:
    def write(w: OnnxWriter, n: Node) -> Any:
        if n.kwargs.get("alpha", 1) != 1 or n.kwargs.get("rounding_mode") is not None:
            raise ValueError(f"[to_onnx] {n.target} with {dict(n.kwargs)} has no ONNX form")
        return w.emit(kind, w.tensor(argument(n, 0)), w.tensor(argument(n, 1)))

    return write


def _rank(n: Node) -> int:
    return len(shape_of(n))


def _each(value: Any, count: int) -> list[int]:
    """torch takes one number for all axes, ONNX one each."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _convolution(w: OnnxWriter, n: Node) -> Any:
    dims = _rank(n) - 2
    padding = _each(argument(n, 4, 0), dims)
    inputs = [w.tensor(argument(n, index)) for index in range(3)]
    return w.emit(
        "Conv", *inputs,
        strides=_each(argument(n, 3, 1), dims), pads=padding + padding,
        dilations=_each(argument(n, 5, 1), dims), group=argument(n, 6, 1),
    )  # fmt: skip


def _transposed_convolution(w: OnnxWriter, n: Node) -> Any:
    dims = _rank(n) - 2
    padding = _each(argument(n, 4, 0), dims)
    inputs = [w.tensor(argument(n, index)) for index in range(3)]
    return w.emit(
        "ConvTranspose", *inputs,
        strides=_each(argument(n, 3, 1), dims), pads=padding + padding,
        output_padding=_each(argument(n, 5, 0), dims), group=argument(n, 6, 1),
        dilations=_each(argument(n, 7, 1), dims),
    )  # fmt: skip


def _linear(w: OnnxWriter, n: Node) -> Any:
    weight = argument(n, 1)
    if is_parameter(weight):
        turned = w.weight(f"{weight.name}_t", parameter(w.program, weight).detach().numpy().T)
    else:
        turned = w.emit("Transpose", w.tensor(weight), perm=[1, 0])
    product = w.emit("MatMul", w.tensor(argument(n, 0)), turned)
    bias = argument(n, 2)
    return product if bias is None else w.emit("Add", product, w.tensor(bias))


def _group_norm(w: OnnxWriter, n: Node) -> Any:
    channels = shape_of(argument(n, 0))[1]
    scale = w.tensor(argument(n, 2)) or w.constant(np.ones(int(channels)), np.float32)
    bias = w.tensor(argument(n, 3)) or w.constant(np.zeros(int(channels)), np.float32)
    x = w.tensor(argument(n, 0))
    return w.emit(
        "GroupNormalization", x, scale, bias, num_groups=argument(n, 1), epsilon=argument(n, 4, 1e-5)
    )


def _instance_norm(w: OnnxWriter, n: Node) -> Any:
    if any(argument(n, index) is not None for index in (3, 4)):
        raise ValueError("[to_onnx] instance norm with running statistics has no ONNX form here")
    channels = int(shape_of(argument(n, 0))[1])
    scale = w.tensor(argument(n, 1)) or w.constant(np.ones(channels), np.float32)
    bias = w.tensor(argument(n, 2)) or w.constant(np.zeros(channels), np.float32)
    return w.emit(
        "InstanceNormalization", w.tensor(argument(n, 0)), scale, bias, epsilon=argument(n, 7, 1e-5)
    )


def _layer_norm(w: OnnxWriter, n: Node) -> Any:
    shape = argument(n, 1)
    scale = w.tensor(argument(n, 2)) or w.constant(np.ones(shape), np.float32)
    x = w.tensor(argument(n, 0))
    bias = w.tensor(argument(n, 3))
    return w.emit("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=argument(n, 4, 1e-5))


def _silu(w: OnnxWriter, n: Node) -> Any:
    x = w.tensor(argument(n, 0))
    return w.emit("Mul", x, w.emit("Sigmoid", x))


def _attention(w: OnnxWriter, n: Node) -> Any:
    """softmax(q k^T scale) v; masks and dropout do not occur in a trained diffusion network."""
    if argument(n, 3) is not None or argument(n, 4, 0.0) or argument(n, 5, False):
        raise ValueError("[to_onnx] attention with a mask or dropout has no ONNX form here")
    q, k, v = (w.tensor(argument(n, index)) for index in range(3))
    scale = n.kwargs.get("scale") or argument(n, 6) or 1 / sqrt(int(shape_of(argument(n, 0))[-1]))
    order = [*range(_rank(n) - 2), _rank(n) - 1, _rank(n) - 2]
    scores = w.emit(
        "MatMul", w.emit("Mul", q, w.constant(scale, np.float32)), w.emit("Transpose", k, perm=order)
    )
    return w.emit("MatMul", w.emit("Softmax", scores, axis=-1), v)


def _reshape(w: OnnxWriter, n: Node) -> Any:
    source: Node = argument(n, 0)
    return w.emit("Reshape", w.tensor(source), w.sizes(reshape_sizes(source, n, argument(n, 1))))


def _expand(w: OnnxWriter, n: Node) -> Any:
    sizes = [1 if size == -1 else size for size in argument(n, 1)]
    return w.emit("Expand", w.tensor(argument(n, 0)), w.sizes(sizes))


def _transpose(w: OnnxWriter, n: Node) -> Any:
    order = list(range(_rank(n)))
    first, second = argument(n, 1) % _rank(n), argument(n, 2) % _rank(n)
    order[first], order[second] = order[second], order[first]
    return w.emit("Transpose", w.tensor(argument(n, 0)), perm=order)


def _permute(w: OnnxWriter, n: Node) -> Any:
    return w.emit("Transpose", w.tensor(argument(n, 0)), perm=[axis % _rank(n) for axis in argument(n, 1)])


def _concatenate(w: OnnxWriter, n: Node) -> Any:
    parts = [w.tensor(part) for part in argument(n, 0)]
    return parts[0] if len(parts) == 1 else w.emit("Concat", *parts, axis=argument(n, 1, 0))


def _split(w: OnnxWriter, n: Node) -> Any:
    """split, split_with_sizes and chunk: the captured parts say how wide each is."""
    axis = argument(n, 2, 0)
    if is_free(n.meta["val"][0].shape[axis]):
        raise ValueError(f"[to_onnx] {n.target} along a free size has no ONNX form here")
    widths = [int(part.shape[axis]) for part in n.meta["val"]]
    parts = w.emit("Split", w.tensor(argument(n, 0)), w.constant(widths), count=len(widths), axis=axis)
    return parts if len(widths) > 1 else [parts]


def _slice(w: OnnxWriter, n: Node) -> Any:
    axis, start, end, step = (argument(n, i, d) for i, d in ((1, 0), (2, None), (3, None), (4, 1)))
    bounds = [w.size(0 if start is None else start), w.size(2**62 if end is None else end)]
    return w.emit("Slice", w.tensor(argument(n, 0)), *bounds, w.constant([axis]), w.constant([step]))


def _resize(mode: str) -> Operator:
    def write(w: OnnxWriter, n: Node) -> Any:
        scale, sizes = argument(n, 3 if mode == "linear" else 2), argument(n, 1)
        aligned = mode == "linear" and argument(n, 2, False)
        where = "align_corners" if aligned else "asymmetric" if mode == "nearest" else "half_pixel"
        x = w.tensor(argument(n, 0))
        if sizes is None:
            target: tuple[Any, ...] = (w.constant([1.0, 1.0, *scale], np.float32), None)
        else:
            target = (None, w.emit("Concat", w.emit("Shape", x, end=2), w.sizes(sizes), axis=0))
        rounding = "floor" if mode == "nearest" else None
        return w.emit("Resize", x, None, *target, mode=mode, nearest_mode=rounding,
                      coordinate_transformation_mode=where)  # fmt: skip

    return write


def _average_pool(w: OnnxWriter, n: Node) -> Any:
    dims = _rank(n) - 2
    kernel = _each(argument(n, 1), dims)
    strides = _each(argument(n, 2) or kernel, dims)
    padding = _each(argument(n, 3, 0), dims)
    return w.emit("AveragePool", w.tensor(argument(n, 0)), kernel_shape=kernel, strides=strides,
                  pads=padding + padding, ceil_mode=int(argument(n, 4, False)),
                  count_include_pad=int(argument(n, 5, True)))  # fmt: skip


def _pad(w: OnnxWriter, n: Node) -> Any:
    """torch lists (before, after) from the last axis on, ONNX all befores and then all afters."""
    if n.target is aten.pad.default and argument(n, 2, "constant") != "constant":
        raise ValueError(f"[to_onnx] padding mode {argument(n, 2)!r} has no ONNX form here")
    given: Sequence[int] = argument(n, 1)
    value = argument(n, 3 if n.target is aten.pad.default else 2, 0.0) or 0.0
    before, after = [0] * _rank(n), [0] * _rank(n)
    for place in range(len(given) // 2):
        before[-1 - place], after[-1 - place] = given[2 * place], given[2 * place + 1]
    return w.emit("Pad", w.tensor(argument(n, 0)), w.constant(before + after), w.constant(value, np.float32))


def _cast(w: OnnxWriter, n: Node) -> Any:
    return w.emit("Cast", w.tensor(argument(n, 0)), to=onnx_dtype(n.meta["val"].dtype))


def _clamp(w: OnnxWriter, n: Node) -> Any:
    return w.emit("Clip", w.tensor(argument(n, 0)), w.tensor(argument(n, 1)), w.tensor(argument(n, 2)))


def _embedding(w: OnnxWriter, n: Node) -> Any:
    return w.emit("Gather", w.tensor(argument(n, 0)), w.tensor(argument(n, 1)), axis=0)


def _einsum(w: OnnxWriter, n: Node) -> Any:
    return w.emit(
        "Einsum", *(w.tensor(part) for part in argument(n, 1)), equation=argument(n, 0).replace(" ", "")
    )


def _prelu(w: OnnxWriter, n: Node) -> Any:
    """ONNX spreads the slopes from the last axis on, torch along the channels."""
    slope = parameter(w.program, argument(n, 1)).detach().numpy()
    shaped = w.constant(slope.reshape(-1, *[1] * (_rank(n) - 2)), np.float32)
    return w.emit("PRelu", w.tensor(argument(n, 0)), shaped)


def _shaped(kind: str) -> Operator:
    return lambda w, n: w.emit(kind, w.tensor(argument(n, 0)), w.constant([argument(n, 1)]))


OPERATORS: dict[Any, Operator] = {
    operator.getitem: lambda w, n: w.values[argument(n, 0)][argument(n, 1)],
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv_transpose2d.input: _transposed_convolution,
    aten.conv_transpose3d.input: _transposed_convolution,
    aten.linear.default: _linear,
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.layer_norm.default: _layer_norm,
    aten.silu.default: _silu,
    aten.gelu.default: lambda w, n: w.emit(
        "Gelu", w.tensor(argument(n, 0)), approximate=n.kwargs.get("approximate", "none")
    ),
    aten.relu.default: _unary("Relu"),
    aten.leaky_relu.default: lambda w, n: w.emit(
        "LeakyRelu", w.tensor(argument(n, 0)), alpha=argument(n, 1, 0.01)
    ),
    aten.prelu.default: _prelu,
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.exp.default: _unary("Exp"),
    aten.sin.default: _unary("Sin"),
    aten.cos.default: _unary("Cos"),
    aten.clamp.default: _clamp,
    aten.argmin.default: lambda w, n: w.emit(
        "ArgMin", w.tensor(argument(n, 0)), axis=argument(n, 1), keepdims=int(argument(n, 2, False))
    ),
    aten.add.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.matmul.default: _binary("MatMul"),
    aten.bmm.default: _binary("MatMul"),
    aten.einsum.default: _einsum,
    aten.softmax.int: lambda w, n: w.emit("Softmax", w.tensor(argument(n, 0)), axis=argument(n, 1)),
    aten.scaled_dot_product_attention.default: _attention,
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.flatten.using_ints: lambda w, n: w.emit(
        "Reshape", w.tensor(argument(n, 0)), w.sizes(reshape_sizes(argument(n, 0), n, [-1] * _rank(n)))
    ),
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.unsqueeze.default: _shaped("Unsqueeze"),
    aten.squeeze.dim: _shaped("Squeeze"),
    aten.select.int: lambda w, n: w.emit(
        "Gather", w.tensor(argument(n, 0)), w.constant(argument(n, 2)), axis=argument(n, 1)
    ),
    aten.cat.default: _concatenate,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.slice.Tensor: _slice,
    aten.upsample_nearest2d.vec: _resize("nearest"),
    aten.upsample_nearest3d.vec: _resize("nearest"),
    aten.upsample_bilinear2d.vec: _resize("linear"),
    aten.upsample_trilinear3d.vec: _resize("linear"),
    aten.avg_pool2d.default: _average_pool,
    aten.avg_pool3d.default: _average_pool,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.embedding.default: _embedding,
    **dict.fromkeys(CASTS, _cast),
}
