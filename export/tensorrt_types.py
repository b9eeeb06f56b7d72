"""A strongly typed network: which values of an ONNX program are half precision, written into the graph as casts.

TensorRT's typed networks compute what the graph says and take no precision flags. Products (convolutions, matrix
products) read and write the half type. Norms, softmax and whatever else loses digits read and write float32 between
two casts, so that their statistics are float32. What is elementwise follows what it reads. Vectors stay float32 until
they meet a product or a volume, and so do the program's inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx_ir import DataType, Graph, Node, Value

from volcast.runtime.spec import Precision

TYPES = {Precision.FP16: DataType.FLOAT16, Precision.BF16: DataType.BFLOAT16}
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
FOLLOWERS: dict[str, tuple[int, ...] | None] = {
    "Abs": None, "Add": None, "Clip": None, "Concat": None, "Div": None, "Expand": (0,), "Flatten": None,
    "Gather": (0,), "Gelu": None, "Identity": None, "LeakyRelu": None, "MaxPool": None, "Max": None, "Min": None,
    "Mul": None, "Neg": None, "Pad": (0, 2), "PRelu": None, "Relu": None, "Reshape": (0,), "Resize": (0,),
    "Sigmoid": None, "Slice": (0,), "Split": (0,), "Squeeze": (0,), "Sub": None, "Tanh": None, "Tile": (0,),
    "Transpose": None, "Unsqueeze": (0,), "Where": (1, 2),
}  # fmt: skip
"""Operators whose output has the type of their inputs at these places (None: all of them)."""
NOT_FLOAT = frozenset({"ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less",
                       "LessOrEqual", "Not", "Shape", "Size"})  # fmt: skip
SOURCE = "volcast.source"
"""On an initializer: the name of the artifact's initializer that it was rounded from."""


def typed(model: onnx_ir.Model, precision: Precision) -> None:
    """Give the model's values the types of `precision`, in place; its inputs and outputs stay as they are.

    Weights are stored in the type in which they are read. Raises ValueError for one that overflows.
    """
    if precision is not Precision.FP32:
        _Typing(model.graph, precision).run()
        # Opset 22 is 21 with bfloat16 for convolutions and pools.
        model.opset_imports[""] = max(model.opset_imports[""], 22)


@final
class _Typing:
    """One graph while it is rewritten. `_half` and `_wide` hold the values that have the half type and float32."""

    def __init__(self, graph: Graph, precision: Precision) -> None:
        self._graph, self._type, self._precision = graph, TYPES[precision], precision
        self._half: set[Value] = set()
        self._wide = {value for value in graph.inputs if value.dtype == DataType.FLOAT}
        self._casts: dict[tuple[Value, DataType], Value] = {}
        # TensorRT-RTX 1.7 has no transposed convolution in bfloat16.
        self._products = PRODUCTS - {"ConvTranspose"} if precision is Precision.BF16 else PRODUCTS

    def run(self) -> None:
        self._unstore()
        self._matmuls()
        for value in self._graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype == DataType.FLOAT:
                self._wide.add(value)
        if self._precision is Precision.FP16:
            self._scale_queries()
        for node in list(self._graph):
            self._type_node(node)
        for place, output in enumerate(list(self._graph.outputs)):
            if output in self._half:
                self._widen_output(place, output)
        for value in self._half:
            value.dtype = self._type
        for name, value in list(self._graph.initializers.items()):
            if not value.uses():
                del self._graph.initializers[name]

    def _unstore(self) -> None:
        """Weights that are stored in half precision and cast, as the float32 weights that they mean."""
        for node in list(self._graph):
            stored = node.inputs[0] if node.op_type == "Cast" else None
            tensor = None if stored is None else stored.const_value
            if tensor is None or stored is None or not _is_half(tensor.dtype):
                continue
            wide = self._initializer(f"{stored.name}.wide", tensor.numpy().astype(np.float32), stored)
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], wide)
            self._graph.remove(node, safe=True)

    def _matmuls(self) -> None:
        """Batched products written as Einsum, which ONNX does not define for bfloat16, as MatMul."""
        for node in list(self._graph):
            if node.op_type != "Einsum":
                continue
            places = _matmul(node.attributes["equation"].as_string())
            if places is None:
                continue
            left, right = node.inputs
            if places:
                turned = onnx_ir.node("Transpose", [right], {"perm": places})
                turned.outputs[0].name = f"{node.outputs[0].name}.right"
                self._graph.insert_before(node, turned)
                right = turned.outputs[0]
            (old,) = node.outputs
            product = onnx_ir.node("MatMul", [left, right])
            (new,) = product.outputs
            new.shape, new.type, new.name = old.shape, old.type, old.name
            old.name = f"{new.name}.einsum"
            self._graph.insert_before(node, product)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            self._graph.remove(node, safe=True)

    def _scale_queries(self) -> None:
        """(q k) s as (q s) k: products of wide heads pass float16's 65504 before they are scaled."""
        for node in list(self._graph):
            if node.op_type != "Mul":
                continue
            product, scale = node.inputs
            maker = None if product is None else product.producer()
            if product is None or maker is None or maker.op_type not in ("Einsum", "MatMul"):
                continue
            if scale is None or scale.const_value is None or scale.const_value.size != 1:
                continue
            if len(product.uses()) > 1 or product.is_graph_output() or node.outputs[0].is_graph_output():
                continue
            query = maker.inputs[0]
            scaled = onnx_ir.node("Mul", [query, scale])
            scaled.outputs[0].name = f"{product.name}.query"
            self._graph.insert_before(maker, scaled)
            maker.replace_input_with(0, scaled.outputs[0])
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], product)
            self._graph.remove(node, safe=True)

    def _type_node(self, node: Node) -> None:
        places = FOLLOWERS.get(node.op_type) or range(len(node.inputs))
        floats = [place for place in places if node.inputs[place] in self._half | self._wide]
        if node.op_type == "Cast":
            if node.attributes["to"].as_int() == DataType.FLOAT:
                self._wide.update(node.outputs)
        elif not floats or node.op_type in NOT_FLOAT:
            return
        elif node.op_type == "QuantizeLinear":
            self._read(node, floats, DataType.FLOAT)
        elif node.op_type in self._products:
            self._read(node, floats, self._type)
            self._half.update(node.outputs)
        elif not any(node.inputs[place] in self._half for place in floats):
            self._wide.update(node.outputs)
        elif node.op_type in FOLLOWERS:
            self._read(node, floats, self._type)
            self._half.update(node.outputs)
        else:
            self._read(node, floats, DataType.FLOAT)
            self._wide.update(node.outputs)
            for output in node.outputs:
                self._narrow(node, output)

    def _read(self, node: Node, places: Sequence[int], dtype: DataType) -> None:
        """Let the node read these inputs in that type."""
        for place in places:
            value = node.inputs[place]
            assert value is not None
            has = self._type if value in self._half else DataType.FLOAT
            if has != dtype:
                node.replace_input_with(place, self._as(value, dtype, node))

    def _as(self, value: Value, dtype: DataType, reader: Node) -> Value:
        key = (value, dtype)
        if key not in self._casts:
            if value.const_value is not None:
                self._casts[key] = self._rounded(value)
            else:
                cast = onnx_ir.node("Cast", [value], {"to": dtype})
                cast.outputs[0].name = f"{value.name}.{dtype.name.lower()}"
                self._graph.insert_before(reader, cast)
                self._casts[key] = cast.outputs[0]
            (self._half if dtype == self._type else self._wide).add(self._casts[key])
        return self._casts[key]

    def _narrow(self, node: Node, output: Value) -> None:
        """Later readers get the half type, or the float32 behind it."""
        readers = [use for use in output.uses()]
        if not readers:
            return
        cast = onnx_ir.node("Cast", [output], {"to": self._type})
        narrow = cast.outputs[0]
        narrow.name = f"{output.name}.{self._type.name.lower()}"
        self._graph.insert_after(node, cast)
        for reader, place in readers:
            reader.replace_input_with(place, narrow)
        self._half.add(narrow)
        self._casts[narrow, DataType.FLOAT] = output

    def _widen_output(self, place: int, output: Value) -> None:
        name, cast = output.name, onnx_ir.node("Cast", [output], {"to": DataType.FLOAT})
        output.name = f"{name}.{self._type.name.lower()}"
        wide = cast.outputs[0]
        wide.name, wide.shape, wide.dtype = name, output.shape, DataType.FLOAT
        self._graph.append(cast)
        self._graph.outputs[place] = wide

    def _rounded(self, value: Value) -> Value:
        assert value.const_value is not None
        wide = value.const_value.numpy()
        with np.errstate(over="ignore"):
            narrow = wide.astype(self._type.numpy())
        if not np.isfinite(narrow.astype(np.float32)).all():
            other = "fp32" if self._precision is Precision.BF16 else "bf16 or fp32"
            raise ValueError(
                f"[build] weight {value.name} reaches {np.abs(wide).max():g}: too large for {self._precision}; use "
                f"--precision {other}"
            )
        return self._initializer(f"{value.name}.{self._precision}", narrow, value)

    def _initializer(self, name: str, array: NDArray[Any], source: Value) -> Value:
        made = Value(name=name, const_value=onnx_ir.tensor(array, name=name))
        made.metadata_props[SOURCE] = source.metadata_props.get(SOURCE, source.name or "")
        self._graph.register_initializer(made)
        return made


def _matmul(equation: str) -> list[int] | None:
    """How to transpose the second operand so that MatMul computes the equation, [] for not at all; None: it cannot."""
    operands, _, out = equation.replace(" ", "").partition("->")
    left, _, right = operands.partition(",")
    batch = left[:-2]
    if len(left) != len(right) or len(right) != len(out) or len(left) < 2 or right[:-2] != batch:
        return None
    if out != batch + left[-2] + (right[-1] if left[-1] == right[-2] else right[-2]):
        return None
    if left[-1] == right[-2]:
        return []
    axes = len(right)
    return [*range(axes - 2), axes - 1, axes - 2] if left[-1] == right[-1] else None


def _is_half(dtype: DataType) -> bool:
    return dtype in (DataType.FLOAT16, DataType.BFLOAT16)
