"""Every tensor's shape at given sizes, so that what TensorRT cannot index is refused before a build begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto, helper, shape_inference

from volcast.runtime.spec import ProgramSpec

LIMIT = 2**31
"""TensorRT's tensors have fewer elements than this."""
SMALL = 4096
"""Bytes below which an initializer may hold sizes, whose values the inference needs."""


def tensor_shapes(path: Path, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every value of the ONNX program at `path`, its free sizes set to `sizes`; weights left out.

    Raises ValueError for a program whose shapes cannot be found.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for value in graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = sizes[size.dim_param]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    del graph.value_info[:]
    _without_weights(model)
    for node in graph.node:
        if node.op_type == "GroupNormalization":  # onnx infers nothing behind it
            node.op_type = "Identity"
            del node.attribute[:], node.input[1:]
    try:
        inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except shape_inference.InferenceError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"[build] the shapes of {path.name} cannot be found: {reason}") from error
    shapes = {
        value.name: tuple(size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.output)
    }
    unknown = [name for node in graph.node for name in node.output if name and 0 in shapes.get(name, (0,))]
    if unknown:
        raise ValueError(f"[build] the shape of {unknown[0]} in {path.name} cannot be found")
    return shapes


def check_elements(path: Path, name: str, program: ProgramSpec, sizes: Mapping[str, int]) -> None:
    """Raise ValueError, with the remedy, where a tensor of the program passes TensorRT's limit at `sizes`."""
    tensors = tensor_shapes(path, sizes)
    inputs = {t.name: tuple(s if isinstance(s, int) else sizes[s] for s in t.shape) for t in program.inputs}
    largest = max(tensors | inputs, key=lambda one: math.prod((tensors | inputs)[one]))
    shape = (tensors | inputs)[largest]
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


def _without_weights(model: ModelProto) -> None:
    kept: list[TensorProto] = []
    for tensor in model.graph.initializer:
        if tensor.ByteSize() < SMALL and tensor.data_location != TensorProto.EXTERNAL:
            kept.append(tensor)
        else:
            named = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            model.graph.input.append(named)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
