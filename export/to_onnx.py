"""A captured program as an ONNX file: named inputs, outputs and free sizes, weights in the asked precision."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from torch.export import Dim
from torch.fx import GraphModule

from volcast.runtime.spec import Precision, TensorSpec

from .graph import hint, inputs, is_free, outputs, shape_of, symbol

OPSET = 21
"""The first with GroupNormalization as MONAI means it."""

EXTERNAL_BYTES = 1_500_000_000
"""Weights above this go to a file beside the model: protobuf ends at 2 GB."""

STORED = {Precision.FP16: onnx_ir.DataType.FLOAT16, Precision.BF16: onnx_ir.DataType.BFLOAT16}


def tensor_specs(
    program: GraphModule, axes: Mapping[str, str], output_names: Sequence[str]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a program; `axes` names every free size by its symbol."""

    def spec(name: str, value: torch.Tensor) -> TensorSpec:
        shape = tuple(axes[symbol(s)] if is_free(s) else s for s in value.shape)
        return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape)  # type: ignore[arg-type]

    values = [node.meta["val"] for node in outputs(program)]
    return (
        tuple(spec(name, node.meta["val"]) for name, node in inputs(program).items()),
        tuple(spec(name, value) for name, value in zip(output_names, values, strict=True)),
    )


def to_onnx(
    program: GraphModule,
    path: Path,
    specs: tuple[Sequence[TensorSpec], Sequence[TensorSpec]],
    *,
    precision: Precision,
    metadata: Mapping[str, str],
) -> None:
    """Write `program` to `path`, its inputs and outputs named and shaped as in `specs`.

    fp16 and bf16 store the weights of two or more axes in that type, with a Cast in front; engines compute in the
    type they choose. Raises ValueError where a weight overflows that type or the model fails onnx.checker.
    """
    examples = tuple(_example(node.meta["val"]) for node in inputs(program).values())
    with _quiet(), torch.no_grad():
        exported = torch.export.export(program, examples, dynamic_shapes=_dynamic(program), strict=False)
        converted = torch.onnx.export(
            exported,
            examples,
            dynamo=True,
            opset_version=OPSET,
            optimize=True,
            verbose=False,
            input_names=[spec.name for spec in specs[0]],
            output_names=[spec.name for spec in specs[1]],
        )
    assert converted is not None
    model = converted.model
    for values, described in ((model.graph.inputs, specs[0]), (model.graph.outputs, specs[1])):
        for value, spec in zip(values, described, strict=True):
            value.shape = onnx_ir.Shape(spec.shape)
    for node in model.graph:
        for value in node.outputs:
            if value not in model.graph.outputs:
                value.shape = None  # torch's symbols would contradict the names above
    if precision in STORED:
        _store_weights(model, STORED[precision])
    model.metadata_props.update(metadata)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if size > EXTERNAL_BYTES else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ValueError(
            f"[to_onnx] {path.name} is not valid ONNX: {' '.join(str(error).split())[:300]}"
        ) from error


def _example(value: torch.Tensor) -> torch.Tensor:
    """A real tensor of the captured shape, free sizes as at capture."""
    shape = [hint(s) for s in value.shape]
    return torch.zeros(shape, dtype=value.dtype)


def _dynamic(program: GraphModule) -> tuple[dict[int, Any], ...]:
    """The free sizes of a program's inputs, for torch.export: `4*s0` stays a multiple of four."""
    known: dict[str, Any] = {}

    def dim(size: Any) -> Any:
        coefficient, rest = size.node.expr.as_coeff_Mul()
        if int(coefficient) == 1:
            return Dim.AUTO
        return int(coefficient) * known.setdefault(str(rest), Dim(f"blocks_{len(known)}", min=1))

    return tuple(
        {axis: dim(size) for axis, size in enumerate(shape_of(node)) if is_free(size)}
        for node in inputs(program).values()
    )


def _store_weights(model: onnx_ir.Model, dtype: onnx_ir.DataType) -> None:
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or len(tensor.shape) < 2:
            continue
        array = tensor.numpy()
        stored = array.astype(dtype.numpy())
        if not np.isfinite(stored.astype(np.float32)).all():
            largest = float(np.abs(array).max())
            raise ValueError(
                f"[export] weight {name} reaches {largest:g}: too large for {dtype.name.lower()}; use fp32"
            )
        low = onnx_ir.Value(name=f"{name}.stored", const_value=onnx_ir.Tensor(stored, name=f"{name}.stored"))
        low.dtype, low.shape = dtype, value.shape
        cast = onnx_ir.node("Cast", [low], {"to": onnx_ir.DataType.FLOAT.value}, num_outputs=1)
        cast.outputs[0].dtype, cast.outputs[0].shape = onnx_ir.DataType.FLOAT, value.shape
        value.replace_all_uses_with(cast.outputs[0])
        del model.graph.initializers[name]
        model.graph.initializers[low.name] = low  # type: ignore[index]
        model.graph.insert_before(model.graph[0], cast)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx prints its progress and warns about packages that these networks do not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
