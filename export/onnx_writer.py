"""Builds an ONNX graph from a captured one: values, weights and sizes; the operators are in `onnx_operators`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray
from onnx_ir import Value
from torch.fx import GraphModule, Node

from volcast.runtime.spec import Precision, TensorSpec

from .graph import argument, aten, is_free, is_parameter, is_size, outputs, parameter, shape_of, symbol

STORED = {Precision.FP16: onnx_ir.DataType.FLOAT16, Precision.BF16: onnx_ir.DataType.BFLOAT16}
ARITHMETIC: dict[Any, str] = {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    operator.floordiv: "Div",  # sizes are positive: ONNX's integer division is the floor
}


@final
class OnnxWriter:
    """One program being written. Operators call `emit`, `tensor`, `sizes` and `constant`."""

    def __init__(self, program: GraphModule, precision: Precision) -> None:
        self.program = program
        self.precision = precision
        self.nodes: list[onnx_ir.Node] = []
        self.initializers: dict[str, Value] = {}
        self.values: dict[Node, Any] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._weights: dict[str, Value] = {}
        self._sizes: dict[str, Value] = {}

    def emit(self, kind: str, *inputs: Value | None, count: int = 1, **attributes: Any) -> Any:
        """Append an ONNX operator; its output, or a list of them where `count` is not 1."""
        given = {key: value for key, value in attributes.items() if value is not None}
        node = onnx_ir.node(kind, list(inputs), given, num_outputs=count)
        for index, value in enumerate(node.outputs):
            value.name = f"{kind.lower()}.{len(self.nodes)}" + (f"_{index}" if count > 1 else "")
        self.nodes.append(node)
        return node.outputs[0] if count == 1 else list(node.outputs)

    def constant(self, array: Any, dtype: Any = np.int64) -> Value:
        """A small constant, shared where it occurs again."""
        value = np.asarray(array, dtype=dtype)
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(f"literal.{len(self._constants)}", value)
        return self._constants[key]

    def weight(self, name: str, array: NDArray[Any]) -> Value:
        """A network's weight; two or more axes of float32 are stored in the program's precision, with a Cast."""
        dtype = STORED.get(self.precision)
        if name in self._weights:
            return self._weights[name]
        if dtype is None or array.dtype != np.float32 or array.ndim < 2:
            value = self._initializer(f"weight.{name}", array)
        else:
            with np.errstate(over="ignore"):
                stored = array.astype(dtype.numpy())
            if not np.isfinite(stored.astype(np.float32)).all():
                largest = float(np.abs(array).max())
                raise ValueError(
                    f"[export] weight {name} reaches {largest:g}: too large for {dtype.name.lower()}; use fp32"
                )
            value = self.emit(
                "Cast", self._initializer(f"weight.{name}", stored), to=onnx_ir.DataType.FLOAT.value
            )
        self._weights[name] = value
        return value

    def tensor(self, item: Any, dtype: Any = np.float32) -> Any:
        """The ONNX value of an argument: a node's, a number's as a constant, None for None."""
        if item is None:
            return None
        if isinstance(item, Node) and is_parameter(item):  # written where an operator first reads it
            return self.weight(item.name, parameter(self.program, item).detach().numpy())
        return self.values[item] if isinstance(item, Node) else self.constant(item, dtype)

    def size(self, item: Any) -> Value:
        """One size as an int64 tensor of shape [1]."""
        if not isinstance(item, Node):
            return self.constant([item])
        key = symbol(item.meta["val"])
        if key not in self._sizes:
            if item.target is aten.sym_size.int:
                axis = argument(item, 1)
                value: Value = self.emit("Shape", self.values[argument(item, 0)], start=axis, end=axis + 1)
            elif item.target in ARITHMETIC:
                value = self.emit(ARITHMETIC[item.target], *(self.size(part) for part in item.args))
            else:
                raise ValueError(f"[to_onnx] the size {item.target} has no ONNX form")
            self._sizes[key] = value
        return self._sizes[key]

    def sizes(self, items: Sequence[Any]) -> Value:
        """A shape as an int64 tensor; free sizes are computed in the graph."""
        if not any(isinstance(item, Node) for item in items):
            return self.constant(list(items))
        shape: Value = self.emit("Concat", *(self.size(item) for item in items), axis=0)
        return shape

    def _initializer(self, name: str, array: NDArray[Any]) -> Value:
        tensor = onnx_ir.Tensor(np.ascontiguousarray(array) if array.ndim else array, name=name)
        value = Value(name=name, const_value=tensor, shape=onnx_ir.Shape(array.shape))
        value.dtype = tensor.dtype
        self.initializers[name] = value
        return value

    def write(
        self, operators: dict[Any, Any], inputs: Sequence[TensorSpec], results: Sequence[TensorSpec]
    ) -> Any:
        """The whole program as an ONNX model. Raises ValueError for an operator that `operators` lacks."""
        described = {spec.name: _described(spec) for spec in inputs}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = described[str(node.target)]
            elif node.op == "call_function" and not is_size(node):
                if node.target not in operators:
                    raise ValueError(
                        f"[to_onnx] {node.target} has no ONNX form: add it to export/onnx_operators.py"
                    )
                self.values[node] = operators[node.target](self, node)
        final: list[Value] = []
        for spec, node in zip(results, outputs(self.program), strict=True):
            value = self.values[node]
            if value in final or value.producer() is None:
                value = self.emit("Identity", value)
            value.name = spec.name
            value.shape, value.dtype = onnx_ir.Shape(spec.shape), onnx_ir.DataType[ONNX_NAMES[spec.dtype]]
            final.append(value)
        graph = onnx_ir.Graph(
            list(described.values()),
            final,
            nodes=self.nodes,
            initializers=list(self._used()),
            opset_imports={"": 21},
            name="volcast",
        )
        return onnx_ir.Model(graph, ir_version=10, producer_name="volcast")

    def _used(self) -> list[Value]:
        read = {value for node in self.nodes for value in node.inputs}
        return [value for value in self.initializers.values() if value in read]


ONNX_NAMES = {"float32": "FLOAT", "float16": "FLOAT16", "int64": "INT64"}


def _described(spec: TensorSpec) -> Value:
    value = Value(name=spec.name, shape=onnx_ir.Shape(spec.shape))
    value.dtype = onnx_ir.DataType[ONNX_NAMES[spec.dtype]]
    return value


def reshape_sizes(source: Node, result: Node, wanted: Sequence[Any]) -> list[Any]:
    """ONNX's Reshape target: 0 keeps the size in that place, one -1 stands for what remains."""
    before, after = shape_of(source), shape_of(result)
    sizes = list(wanted)
    for place, size in enumerate(after):
        if is_free(size):
            same = place < len(before) and symbol(before[place]) == symbol(size)
            sizes[place] = 0 if same else sizes[place]
        else:
            sizes[place] = int(size)
    open_places = [place for place, size in enumerate(sizes) if isinstance(size, Node) or size == -1]
    if len(open_places) == 1:
        sizes[open_places[0]] = -1
    return sizes


def onnx_dtype(dtype: torch.dtype) -> int:
    """ONNX's number of a torch dtype."""
    names = {torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.float16: "FLOAT16", torch.int64: "INT64"}
    if dtype not in names:
        raise ValueError(f"[to_onnx] a tensor of {dtype}: need one of {[str(name) for name in names]}")
    return int(onnx_ir.DataType[names[dtype]].value)
