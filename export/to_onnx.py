"""A captured program as an ONNX file: named inputs, outputs and free sizes, weights in the asked precision.

Written by `onnx_writer`, operator by operator, and not by torch.onnx.export: that traces the program three more times
with symbolic sizes, over half of the whole export's time (README, "Why not torch.onnx"), and wraps norms and reshapes
in shape arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir
import torch
from torch.fx import GraphModule

from volcast.runtime.external_data import EXTERNAL_BYTES
from volcast.runtime.spec import Precision, TensorSpec

from .graph import inputs, is_free, outputs, symbol
from .onnx_operators import OPERATORS
from .onnx_writer import OnnxWriter

Specs = tuple[Sequence[TensorSpec], Sequence[TensorSpec]]


def tensor_specs(
    program: GraphModule, axes: Mapping[str, str], output_names: Sequence[str]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a program; `axes` names every free size by its symbol."""

    def spec(name: str, value: torch.Tensor) -> TensorSpec:
        shape = tuple(axes[symbol(size)] if is_free(size) else size for size in value.shape)
        return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape)  # type: ignore[arg-type]

    values = [node.meta["val"] for node in outputs(program)]
    return (
        tuple(spec(name, node.meta["val"]) for name, node in inputs(program).items()),
        tuple(spec(name, value) for name, value in zip(output_names, values, strict=True)),
    )


def to_onnx(
    program: GraphModule, path: Path, specs: Specs, *, precision: Precision, metadata: Mapping[str, str]
) -> None:
    """Write `program` to `path`, its inputs and outputs named and shaped as in `specs`.

    fp16 and bf16 store the weights of two or more axes in that type, with a Cast in front; engines compute in the
    type they choose. Raises ValueError where an operator has no ONNX form, a weight overflows the type, or the model
    fails onnx.checker with shape inference.
    """
    model = OnnxWriter(program, precision).write(OPERATORS, *specs)
    model.metadata_props.update(metadata)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if size > EXTERNAL_BYTES else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ValueError(
            f"[to_onnx] {path.name} is not valid ONNX: {' '.join(str(error).split())[:300]}"
        ) from error
