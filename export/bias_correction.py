"""Bias correction: rounded weights shift a convolution's mean, by a number that calibration knows; the bias takes it back.

With E[x] the mean of an input channel, weights W' instead of W add (W' - W) E[x] to every result (Nagel et al.,
arXiv:1906.04721, section 4.2). It is the same at each of a sampler's steps, so that it adds up where noise averages out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from .qdq import Layer, int8_weights

Array = NDArray[np.float64]


def corrected_inputs(model: onnx.ModelProto, chosen: Sequence[Layer]) -> dict[str, int]:
    """The values whose channel means `corrected` needs, with their number of axes: what convolutions read."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = (each for each in chosen if model.graph.node[each.node].op_type != "MatMul")
    return {each.input: len(weights[each.weight].dims) for each in convolutions}


def corrected(model: onnx.ModelProto, chosen: Sequence[Layer], means: Mapping[str, Array]) -> onnx.ModelProto:
    """A copy of `model` whose convolutions in `chosen` have the biases that fit their weights in int8.

    `means` holds the mean `[C]` of every value of `corrected_inputs`. A convolution without a bias gets one.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for layer in chosen:
        node = graph.node[layer.node]
        if node.op_type == "MatMul":
            continue
        shift = _shift(node, numpy_helper.to_array(constants[layer.weight]), layer.axis, means[layer.input])
        given = node.input[2] if len(node.input) > 2 else ""
        if given and given not in constants:
            continue
        bias = numpy_helper.to_array(constants[given]) if given else np.zeros(len(shift))
        name = f"{node.output[0]}/bias"
        graph.initializer.append(numpy_helper.from_array((bias - shift).astype(np.float32), name))
        node.input[2:] = [name]
    return result


def _shift(node: onnx.NodeProto, weights: NDArray[np.generic], axis: int, mean: Array) -> Array:
    """What the rounding of the weights adds to the mean of every output channel, `[K]`."""
    attributes = {each.name: each for each in node.attribute}
    rounded, scale = int8_weights(weights, axis)
    ones = [-1 if each == axis else 1 for each in range(weights.ndim)]
    error = rounded * scale.astype(np.float64).reshape(ones) - weights.astype(np.float64)
    taps = error.sum(axis=tuple(range(2, weights.ndim)))
    if node.op_type == "ConvTranspose":
        # Of its taps a result sees one in as many as the strides multiply to.
        strides = math.prod(attributes["strides"].ints) if "strides" in attributes else 1
        return np.asarray(mean @ taps / strides)
    groups = attributes["group"].i if "group" in attributes else 1
    spread = np.repeat(mean.reshape(groups, -1), len(taps) // groups, axis=0)
    return np.asarray((taps * spread).sum(axis=1))
