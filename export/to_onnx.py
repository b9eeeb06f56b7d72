"""A captured program as an ONNX file: named inputs, outputs and free sizes, weights in the asked precision.

Written by `onnx_writer`, operator by operator, and not by torch.onnx.export: that traces the program three more times
with symbolic sizes, over half of the whole export's time (README, "Why not torch.onnx"), and wraps norms and reshapes
in shape arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch.fx import GraphModule

from volcast.runtime.external_data import EXTERNAL_BYTES
from volcast.runtime.spec import Precision, TensorSpec

from .gradient_operators import GRADIENT_OPERATORS
from .graph import inputs, is_free, outputs, symbol
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
    program: GraphModule,
    path: Path,
    specs: Specs,
    *,
    precision: Precision,
    metadata: Mapping[str, str],
    apart: bool = False,
    weights_of: Path | None = None,
) -> None:
    """Write `program` to `path`, its inputs and outputs named and shaped as in `specs`.

    Weights go to a file beside it where they are too large for one, or `apart`. `weights_of` is a program in the same
    folder that was written so: what it holds already is read from there. fp16 and bf16 store the weights of two or more axes in that type, with a Cast in front; engines compute in the
    type they choose. Raises ValueError where an operator has no ONNX form, a weight overflows the type, or the model
    fails onnx.checker with shape inference.
    """
    model = OnnxWriter(program, precision).write(GRADIENT_OPERATORS, *specs)
    model.metadata_props.update(metadata)
    if weights_of is not None:
        _share(model, weights_of)
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if not isinstance(value.const_value, onnx_ir.ExternalTensor)
    )
    beside = apart or size > EXTERNAL_BYTES
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if beside else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ValueError(
            f"[to_onnx] {path.name} is not valid ONNX: {' '.join(str(error).split())[:300]}"
        ) from error


def _share(model: Any, owner: Path) -> None:
    """Point the weights that the program `owner` keeps outside at where it keeps them."""
    kept = {
        _digest(value.const_value): value.const_value
        for value in onnx_ir.load(owner).graph.initializers.values()
        if isinstance(value.const_value, onnx_ir.ExternalTensor)
    }
    for value in model.graph.initializers.values():
        own = value.const_value
        found = kept.get(_digest(own))
        if found is not None:
            value.const_value = onnx_ir.ExternalTensor(
                found.location, found.offset, found.length, own.dtype, shape=own.shape, name=own.name,
                base_dir=owner.parent,
            )  # fmt: skip


def _digest(tensor: Any) -> tuple[Any, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()
