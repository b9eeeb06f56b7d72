"""Where an artifact's program can use the kernels of `kernels/`, read from its ONNX graph at fixed sizes.

Only shapes are read; no weight is loaded. A norm takes the SiLU that follows it, an output convolution with few
channels takes the norm before it. Elementwise chains are no uses: which operators are one chain, and which bias is part
of it, is what the passes of a device program find, and no node of the graph stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import NodeProto, helper

Shape = tuple[int, ...]
ProgramName = Literal["step", "decode", "encode", "sampler"]
FEW_CHANNELS = 8
"""Heads of networks: what the `input_head` and `output_head` kernels take."""


@dataclass(frozen=True, kw_only=True)
class KernelUse:
    """One place in a program: the operation, the shapes of its tensors (PyTorch's axis order) and its settings."""

    program: ProgramName
    node: str
    operation: str
    shapes: dict[str, Shape]
    settings: dict[str, Any] = field(default_factory=dict)


def kernel_uses(path: Path, program: ProgramName, sizes: dict[str, int]) -> list[KernelUse]:
    """The uses in the ONNX file `path`, its named axes bound by `sizes`. Raises ValueError for an axis without size."""
    model = onnx.load(path, load_external_data=False)
    graph = _Graph(model, sizes)
    found: dict[str, KernelUse] = {}
    for node in model.graph.node:  # what makes a tensor comes before what reads it
        use = _match(graph, program, node, found)
        if use is not None:
            found[use.node] = use
    return list(found.values())


def output_shape(path: Path, sizes: dict[str, int]) -> Shape:
    """The shape of a program's first output at these sizes."""
    model = onnx.load(path, load_external_data=False)
    return _shapes(model, sizes)[model.graph.output[0].name]


class _Graph:
    def __init__(self, model: onnx.ModelProto, sizes: dict[str, int]) -> None:
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.shapes = _shapes(model, sizes)
        self.scalars = {
            weight.name: float(onnx.numpy_helper.to_array(weight).reshape(()))
            for weight in model.graph.initializer
            if all(size == 1 for size in weight.dims) and weight.data_location != onnx.TensorProto.EXTERNAL
        }

    def shape(self, name: str) -> Shape:
        if name not in self.shapes:
            raise ValueError(f"[build] the shape of {name} cannot be inferred; export the model again")
        return self.shapes[name]

    def silu_of(self, name: str) -> str | None:
        """The output of x * sigmoid(x) where nothing else reads x."""
        users = self.consumers.get(name, [])
        if sorted(user.op_type for user in users) != ["Mul", "Sigmoid"]:
            return None
        product = next(user for user in users if user.op_type == "Mul")
        sigmoid = next(user for user in users if user.op_type == "Sigmoid")
        return str(product.output[0]) if sigmoid.output[0] in product.input else None


def _shapes(model: onnx.ModelProto, sizes: dict[str, int]) -> dict[str, Shape]:
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    for value in bound.graph.output:
        for axis in value.type.tensor_type.shape.dim:
            axis.Clear()
    for value in bound.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                if axis.dim_param not in sizes:
                    raise ValueError(f"[build] axis {axis.dim_param} of {value.name} has no size")
                axis.dim_value = sizes[axis.dim_param]
    for node in bound.graph.node:
        # onnx infers no shape through GroupNormalization; this one keeps its input's shape too.
        if node.op_type == "GroupNormalization":
            node.op_type = "InstanceNormalization"
            del node.attribute[:]
    inferred = onnx.shape_inference.infer_shapes(bound, data_prop=True)
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    shapes = {
        value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim) for value in values
    }
    shapes |= {weight.name: tuple(weight.dims) for weight in model.graph.initializer}
    return {name: shape for name, shape in shapes.items() if 0 not in shape}


def _match(
    graph: _Graph, program: ProgramName, node: NodeProto, found: dict[str, KernelUse]
) -> KernelUse | None:
    """The use at a node. An output head takes the norm before it out of `found`, the uses so far by node."""
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    place = {"program": program, "node": node.output[0]}
    match node.op_type:
        case "GroupNormalization":
            return KernelUse(
                **place, operation="group_norm", shapes={"x": graph.shape(node.input[0])},
                settings={
                    "groups": attributes["num_groups"], "eps": round(attributes.get("epsilon", 1e-5), 12),
                    "activation": "silu" if graph.silu_of(node.output[0]) else "none",
                },
            )  # fmt: skip
        case "LayerNormalization":
            x = graph.shape(node.input[0])
            if len(x) == 3 and attributes.get("axis", -1) in (-1, 2):
                settings = {"eps": round(attributes.get("epsilon", 1e-5), 12)}
                return KernelUse(**place, operation="layer_norm", shapes={"x": x}, settings=settings)
        case "Conv":
            weight = graph.shape(node.input[1])
            if not _is_plain(attributes, weight):
                return None
            norm = _norm_before(graph, node.input[0], found)
            if norm is not None and weight[0] <= FEW_CHANNELS:
                del found[norm.node]
                return KernelUse(**place, operation="output_head", shapes={**norm.shapes, "weight": weight},
                                 settings=norm.settings)  # fmt: skip
            if weight[1] <= FEW_CHANNELS:
                x = graph.shape(node.input[0])
                return KernelUse(**place, operation="input_head", shapes={"x": x, "weight": weight})
        case "ConvTranspose":
            _, cout, *kernel = graph.shape(node.input[1])
            doubles = set(attributes["strides"]) == {2} and set(attributes["pads"]) == {1}
            if set(kernel) == {4} and doubles and attributes.get("group", 1) == 1:
                x = graph.shape(node.input[0])
                return KernelUse(**place, operation="upsample_convolution", shapes={"x": x},
                                 settings={"channels": cout})  # fmt: skip
        case "Softmax":
            scores, scale = _scaled(graph, node.input[0])
            if scores is not None and scores.op_type in ("Einsum", "MatMul"):
                _, before = _scaled(graph, scores.input[0])
                query = graph.shape(scores.input[0])
                *batch, length, keys = graph.shape(node.output[0])
                heads = (1, *batch)[-2:] if len(batch) == 1 else tuple(batch)
                return KernelUse(
                    **place, operation="attention",
                    shapes={"q": (*heads, length, query[-1]), "k": (*heads, keys, query[-1])},
                    settings={"scale": scale * before},
                )  # fmt: skip
    return None


def _is_plain(attributes: dict[str, Any], weight: Shape) -> bool:
    """A 3^3 or 3^2 convolution with stride 1 and padding 1."""
    ones = all(set(attributes.get(name, [1])) == {1} for name in ("strides", "pads", "dilations"))
    return set(weight[2:]) == {3} and ones and attributes.get("group", 1) == 1


def _norm_before(graph: _Graph, name: str, found: dict[str, KernelUse]) -> KernelUse | None:
    """The norm that makes a tensor, perhaps with SiLU, which only one node reads."""
    if len(graph.consumers[name]) > 1 or name not in graph.producer:
        return None
    for source in (name, *graph.producer[name].input):
        norm = found.get(source)
        if norm is not None and norm.operation == "group_norm" and name in (source, graph.silu_of(source)):
            return norm
    return None


def _scaled(graph: _Graph, name: str) -> tuple[NodeProto | None, float]:
    """What makes a tensor before it is multiplied by numbers, and their product."""
    node, factor = graph.producer.get(name), 1.0
    while node is not None and node.op_type == "Mul":
        numbers = [source for source in node.input if source in graph.scalars]
        if not numbers:
            break
        factor *= graph.scalars[numbers[0]]
        (name,) = [source for source in node.input if source != numbers[0]]
        node = graph.producer.get(name)
    return node, factor
