"""A typed half-precision ONNX program as a float32 one that ONNX Runtime computes with every rounding.

ONNX Runtime has no half-precision convolution on a CPU and takes the casts around its float32 ones away again, so that
nothing would be rounded. Here each value of half type is rounded by Dekker's splitting (T. J. Dekker, 1971, "A
floating-point technique for extending the available precision"): with c = x (2^s + 1), c - (c - x) is x with s bits
fewer, to nearest. float16's range is checked by the caller; its subnormal numbers are not rounded further.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
from onnx_ir import DataType, Value

SPLIT = {DataType.FLOAT16: 2.0**13 + 1, DataType.BFLOAT16: 2.0**16 + 1}
"""float32 has 24 bits, float16 11 and bfloat16 8."""


def rounded(typed: Path, to: Path) -> set[str]:
    """Write the program at `typed` to `to` in float32; the operators that read and write half precision."""
    model = onnx_ir.load(typed)
    graph = model.graph
    types: dict[Value, DataType] = {}
    kinds: set[str] = set()
    for value in list(graph.initializers.values()):
        dtype = value.dtype
        if dtype in SPLIT:
            types[value] = dtype
            wide = onnx_ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.const_value, value.dtype = wide, DataType.FLOAT
    for node in list(graph):
        halves = {types[one] for one in node.inputs if one in types}
        if node.op_type == "Cast":
            wanted = DataType(node.attributes["to"].as_int())
            if wanted not in (*SPLIT, DataType.FLOAT):
                continue
            node.attributes["to"] = onnx_ir.AttrInt64("to", DataType.FLOAT)
            halves = {wanted} & SPLIT.keys()
        elif not halves or node.op_type == "Shape":
            continue
        else:
            kinds.add(node.op_type)
        for output in node.outputs if halves else ():
            (dtype,) = halves
            output.dtype = DataType.FLOAT
            types[_split(graph, node, output, SPLIT[dtype])] = dtype
            types[output] = dtype
    model.opset_imports[""] = 21
    onnx_ir.save(model, to)
    return kinds


def run(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs on the CPU; simplifications that reckon with real numbers are off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def _split(graph: onnx_ir.Graph, node: onnx_ir.Node, x: Value, factor: float) -> Value:
    readers = list(x.uses())
    constant = f"split.{factor:g}"
    if constant not in graph.initializers:
        tensor = onnx_ir.tensor(np.array(factor, np.float32), name=constant)
        graph.register_initializer(Value(name=constant, const_value=tensor))
    c = onnx_ir.node("Mul", [x, graph.initializers[constant]])
    low = onnx_ir.node("Sub", [c.outputs[0], x])
    high = onnx_ir.node("Sub", [c.outputs[0], low.outputs[0]])
    after = node
    for made, name in ((c, "c"), (low, "low"), (high, "high")):
        made.outputs[0].name = f"{x.name}.{name}"
        made.outputs[0].dtype = DataType.FLOAT
        graph.insert_after(after, made)
        after = made
    for reader, place in readers:
        reader.replace_input_with(place, high.outputs[0])
    return high.outputs[0]
