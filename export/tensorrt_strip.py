"""Plans without weights: the typed program without them, and where in the artifact each is found again."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnx_ir
from onnx_ir import DataType

from volcast.runtime.plans import Weight
from volcast.runtime.refit import WEIGHTS

from .tensorrt_types import SOURCE

KEPT = 1024
"""Bytes up to which an initializer stays in the skeleton: sizes, scales and the like."""
FLOATS: dict[DataType, Literal["float32", "float16", "bfloat16"]] = {
    DataType.FLOAT: "float32",
    DataType.FLOAT16: "float16",
    DataType.BFLOAT16: "bfloat16",
}


def write_skeleton(model: onnx_ir.Model, path: Path) -> tuple[Weight, ...]:
    """Write `model` to `path` without its weights, and the weights beside it to `refit.WEIGHTS`.

    The file of weights is what `refit.write_weights` makes again from the artifact.
    """
    weights, offset = [], 0
    with open(path.parent / WEIGHTS, "wb") as stream:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= KEPT or tensor.dtype not in FLOATS:
                continue
            stream.write(tensor.tobytes())
            source = value.metadata_props.get(SOURCE, name)
            weights.append(Weight(name=name, source=source, dtype=FLOATS[tensor.dtype]))
            value.const_value = onnx_ir.ExternalTensor(
                WEIGHTS,
                offset,
                tensor.nbytes,
                tensor.dtype,
                name=name,
                shape=onnx_ir.Shape(tensor.shape.numpy()),
                base_dir=path.parent,
            )
            offset += tensor.nbytes
    onnx_ir.save(model, path)
    return tuple(weights)
