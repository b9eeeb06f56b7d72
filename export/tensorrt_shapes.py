"""Every tensor's shape at given sizes, so that what TensorRT cannot index is refused before a build begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import NodeProto

from volcast.runtime.engine import shapes as input_shapes
from volcast.runtime.onnx_graph import read_graph
from volcast.runtime.onnx_shapes import Shape, sized_values
from volcast.runtime.spec import ProgramSpec

LIMIT = 2**31
"""TensorRT's tensors have fewer elements than this."""
PRODUCTS = ("Einsum", "MatMul")
FUSED = range(16, 257)
"""Channels of a head with which TensorRT-RTX 1.7 fuses attention of two heads or more, as its plans show. It fuses no
single head, none in float32, and none of 8 or 512 channels."""


def tensor_shapes(path: Path, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shape of every value of the ONNX program at `path`, for inputs of these shapes; weights left out.

    Raises ValueError for a program whose shapes cannot be found.
    """
    graph = read_graph(path)
    try:
        found = sized_values(graph, inputs)
    except ValueError as error:
        reason = str(error).removeprefix("[memory] ").partition(";")[0]
        raise ValueError(
            f"[build] the shapes of {path.name} cannot be found: {reason}; use --engine onnxruntime"
        ) from error
    return {name: one.shape for name, one in found.items() if name not in graph.constants}


def check_elements(
    path: Path, name: str, program: ProgramSpec, sizes: Mapping[str, int], fused: bool = True
) -> None:
    """Raise ValueError, with the remedy, where a tensor of the program passes TensorRT's limit at `sizes`.

    `fused`: attention in half precision becomes one kernel, whose scores are never a tensor (see `FUSED`).
    """
    shapes = tensor_shapes(path, input_shapes(program, sizes))
    if fused:
        shapes = {name: shapes[name] for name in shapes.keys() - fused_scores(path, shapes)}
    largest = max(shapes, key=lambda one: math.prod(shapes[one]))
    shape = shapes[largest]
    if math.prod(shape) >= LIMIT:
        batch = "a smaller --batch or --size" if name in ("step", "prepare") else "a smaller --size"
        slabs = (
            "; larger volumes: --engine cuda --memory-limit, which decodes in slabs"
            if name == "decode"
            else ""
        )
        raise ValueError(
            f"[build] {name}: {largest} would have {math.prod(shape)} elements {shape}: TensorRT's tensors have fewer "
            f"than 2^31; give {batch}{slabs}"
        )


def fused_scores(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The values inside of attentions that are fused: scores, scaled or masked, and their softmax."""
    graph = onnx.load(path, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: set[str] = set()
    for node in graph.node:
        if node.op_type != "Softmax" or any(
            one.op_type not in PRODUCTS for one in readers.get(node.output[0], ())
        ):
            continue
        chain, name = {node.output[0]}, node.input[0]
        while name in makers and makers[name].op_type in ("Add", "Div", "Mul"):
            chain.add(name)
            name = makers[name].input[0]
        if name not in makers or makers[name].op_type not in PRODUCTS:
            continue
        query = shapes.get(makers[name].input[0], ())
        if len(query) == 4 and query[1] > 1 and query[-1] in FUSED:
            found |= chain | {name}
    return found
