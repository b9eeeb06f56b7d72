"""Explicit quantisation of an ONNX program: which layers run in int8, and the QuantizeLinear pairs around them.

Everything is symmetric int8 (zero point 0), the one form that OpenVINO, ONNX Runtime and TensorRT all run: weights one
scale an output channel, activations one scale a tensor. The pairs stand on what a layer reads, for that layer alone, and on what some
convolutions give; norms, attention's products and activation functions compute in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from volcast.runtime.external_data import EXTERNAL_BYTES

LARGEST = 127
"""Symmetric: -128 is left out, so that -w is as exact as w."""
CHANNELS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}
"""The axis of a layer's weights that counts its output channels."""
WEIGHTED = {*CHANNELS, "Gemm"}
NORM = {"GroupNormalization"}
ARITHMETIC = NORM | {"Add", "Concat", "Conv", "ConvTranspose", "Mul", "Sigmoid"}
"""What may follow a convolution whose result is quantised: ONNX Runtime 1.32 moves a pair past operators that move data
(Transpose, Reshape), gives it a zero point of another type, and then refuses the file."""


@final
@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer with constant weights that is to run in int8.

    `node` is its place in the graph; `axis` counts the output channels of `weight`; `result` is the value that it gives
    where that is quantised too.
    """

    node: int
    input: str
    weight: str
    axis: int
    result: str | None


def layers(model: onnx.ModelProto, *, residuals: bool) -> tuple[Layer, ...]:
    """The layers to quantise: convolutions and matrix products with float32 weights, but the first and the last ones.

    First is a layer that no other one stands above on any path from the inputs, last one that none stands below; both
    stay in float32, and so does whatever has no weights of two or more axes: norms, attention, activations.

    A convolution's result is quantised where a norm alone reads it; with `residuals` also where it is added to others:
    ONNX Runtime computes in int8 only between two quantised values (2x a step), OpenVINO and TensorRT need no more
    than quantised inputs.
    """
    graph = model.graph
    weights = {
        tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
    }
    weighted = [
        node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in weights for node in graph.node
    ]
    below, above = _reach(graph.node, weighted), _reach_back(graph.node, weighted)
    readers = _readers(graph)
    outputs = {value.name for value in graph.output}
    found = []
    for place, node in enumerate(graph.node):
        if not weighted[place] or not below[place] or not above[place] or node.op_type not in CHANNELS:
            continue
        axes = len(weights[node.input[1]].dims)
        grouped = any(attribute.name == "group" and attribute.i != 1 for attribute in node.attribute)
        # The channels of a grouped transposed convolution have no axis of their own.
        if (
            axes < 2
            or (node.op_type == "MatMul" and axes != 2)
            or (node.op_type == "ConvTranspose" and grouped)
        ):
            continue
        result = node.output[0]
        quantised = (
            node.op_type == "Conv"
            and result not in outputs
            and readers[result] <= (ARITHMETIC if residuals else NORM)
        )
        found.append(
            Layer(
                node=place,
                input=node.input[0],
                weight=node.input[1],
                axis=CHANNELS[node.op_type],
                result=result if quantised else None,
            )
        )
    return tuple(found)


def activations(chosen: Iterable[Layer]) -> tuple[str, ...]:
    """The values whose range `quantized` needs, each once."""
    return tuple(
        dict.fromkeys(name for each in chosen for name in (each.input, each.result) if name is not None)
    )


def quantized(
    model: onnx.ModelProto, chosen: Sequence[Layer], largest: Mapping[str, float]
) -> onnx.ModelProto:
    """A copy of `model` whose `chosen` layers read int8; `largest` holds the largest magnitude of every activation.

    Weights are stored in int8 with a DequantizeLinear in front.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    by_place = {each.node: each for each in chosen}
    everywhere = {each.result for each in chosen}
    nodes: list[onnx.NodeProto] = []
    made: dict[str, str] = {}

    def pair(value: str) -> str:
        if value not in made:
            scale, zero = f"{value}/scale", f"{value}/zero"
            graph.initializer.append(numpy_helper.from_array(_scale(np.float64(largest[value])), scale))
            graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), zero))
            nodes.append(helper.make_node("QuantizeLinear", [value, scale, zero], [f"{value}/int8"]))
            nodes.append(
                helper.make_node("DequantizeLinear", [f"{value}/int8", scale, zero], [f"{value}/rounded"])
            )
            made[value] = f"{value}/rounded"
        return made[value]

    def weight(layer: Layer) -> str:
        name = layer.weight
        if name not in made:
            values, scale = int8_weights(numpy_helper.to_array(weights[name]), layer.axis)
            for array, suffix in (
                (values, "int8"),
                (scale, "scale"),
                (np.zeros(len(scale), np.int8), "zero"),
            ):
                graph.initializer.append(numpy_helper.from_array(array, f"{name}/{suffix}"))
            inputs = [f"{name}/{suffix}" for suffix in ("int8", "scale", "zero")]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}/rounded"], axis=layer.axis))
            made[name] = f"{name}/rounded"
        return made[name]

    for place, node in enumerate(list(graph.node)):
        layer = by_place.get(place)
        for index, value in enumerate(node.input):
            if value in everywhere:
                node.input[index] = pair(value)
        if layer is not None:
            # A value that is quantised everywhere was replaced above.
            node.input[0] = node.input[0] if layer.input in everywhere else pair(layer.input)
            node.input[1] = weight(layer)
        nodes.append(node)
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
    _drop_unread(graph)
    return result


def int8_weights(values: NDArray[Any], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(int8 values, float32 scales `[channels]`): every channel's largest magnitude becomes 127."""
    others = tuple(each for each in range(values.ndim) if each != axis)
    scale = _scale(np.abs(values.astype(np.float64)).max(axis=others))
    spread = np.expand_dims(scale.astype(np.float64), others)
    return np.clip(np.rint(values / spread), -LARGEST, LARGEST).astype(np.int8), scale


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write `model`; weights that protobuf cannot hold go to a file beside it."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    onnx.save(model, path, save_as_external_data=size > EXTERNAL_BYTES, location=f"{path.name}.data")


def _scale(largest: NDArray[np.float64] | np.float64) -> NDArray[np.float32]:
    # What is always zero is exact at any scale; a scale below float32's normal numbers would lose its digits.
    usable = np.asarray(largest) >= LARGEST * np.finfo(np.float32).tiny
    return np.asarray(np.where(usable, np.asarray(largest) / LARGEST, 1), np.float32)


def _reach(nodes: Sequence[onnx.NodeProto], weighted: Sequence[bool]) -> list[bool]:
    """Of every node, in topological order: does a weighted node stand above it?"""
    reached: set[str] = set()
    found = []
    for node, own in zip(nodes, weighted, strict=True):
        found.append(any(value in reached for value in node.input))
        if own or found[-1]:
            reached.update(node.output)
    return found


def _reach_back(nodes: Sequence[onnx.NodeProto], weighted: Sequence[bool]) -> list[bool]:
    """Of every node: does a weighted node stand below it?"""
    reached: set[str] = set()
    found = []
    for node, own in zip(reversed(nodes), reversed(weighted), strict=True):
        found.append(any(value in reached for value in node.output))
        if own or found[-1]:
            reached.update(node.input)
    return found[::-1]


def _readers(graph: onnx.GraphProto) -> dict[str, set[str]]:
    readers: dict[str, set[str]] = {output: set() for node in graph.node for output in node.output}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, set()).add(node.op_type)
    return readers


def _drop_unread(graph: onnx.GraphProto) -> None:
    read = {value for node in graph.node for value in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
