"""The memory of OpenVINO's CPU plugin (2026.2 to 2026.4), from a program's operators and sizes."""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import final

from .footprint import EngineMemory, Footprint
from .liveness import Heap, Memory, Walk, constant_values, is_view, weight_bytes
from .onnx_graph import Node, OnnxGraph
from .onnx_shapes import BINARY, UNARY, Sized

CONVOLUTIONS = {"Conv", "ConvTranspose"}
EITHER = {"Resize", "Concat", "AveragePool", "MaxPool"}
"""Work on volumes in the order in which they get them."""


NODE = 100 * 2**10
"""Bytes of an operator: its kernels are compiled for its sizes. Measured, as the next."""
LIBRARY = 43 * 2**20
"""What the first program of a process takes besides: pages of the library and of its plugin."""


def footprint(graph: OnnxGraph, values: Mapping[str, Sized]) -> Footprint:
    """Weights stay as they are in the file and as kernels want them; values lie in one planned block, inputs and
    outputs in tensors of their own, and the outputs are copied out."""
    graph = integers(graph)
    heap = Heap()
    run(graph, values, heap)
    weights = weight_bytes(graph, values)
    inputs, outputs = (sum(values[name].bytes for name in names) for names in (graph.inputs, graph.outputs))
    held = weights * 21 // 10 + NODE * len(graph.nodes) + inputs + heap.peak + outputs
    return Footprint(opening=weights, held=held, call=outputs)


def integers(graph: OnnxGraph) -> OnnxGraph:
    """As low precision runs it: layers read int8 values and weights as they are, a convolution rounds its own result, and
    other values are rounded, and convolved, as soon as they are made."""
    rounded = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.kind == "DequantizeLinear"}
    read = [
        replace(node, inputs=tuple(rounded.get(name, name) for name in node.inputs))
        for node in graph.nodes
        if node.kind != "DequantizeLinear"
    ]
    readers, nodes, done = _readers(read), list[Node](), set[str]()

    def place(node: Node) -> None:
        if node.outputs[0] in done:
            return
        done.update(node.outputs)
        pairs = [one for one in readers.get(node.outputs[0], ()) if one.kind == "QuantizeLinear"]
        if pairs and node.kind in CONVOLUTIONS and len(readers[node.outputs[0]]) == 1:
            done.update(pairs[0].outputs)
            nodes.append(replace(node, outputs=pairs[0].outputs))
            return
        nodes.append(node)
        for one in pairs or [
            one for one in readers.get(node.outputs[0], ()) if node.kind == "QuantizeLinear"
        ]:
            if one.kind == "QuantizeLinear" or one.kind in CONVOLUTIONS:
                place(one)

    for node in read:
        place(node)
    return replace(graph, nodes=tuple(nodes))


MEMORY = EngineMemory(library_bytes=LIBRARY, footprint=footprint)


def run(graph: OnnxGraph, values: Mapping[str, Sized], memory: Memory) -> None:
    """Takes and gives back what a call does inside the plugin; the program's outputs lie in tensors of their own."""
    constant = constant_values(graph)
    nodes = [node for node in graph.nodes if not constant.issuperset(node.outputs) and node.kind != "Shape"]
    state = _State(Walk(nodes, graph, values, memory), nodes, constant)
    state.turn_inputs(nodes, graph.inputs)
    for node in nodes:
        state.operator(node)


@final
class _State:
    """Convolutions read and write volumes channels last, norms channels first: the copies between the two are where
    most of the memory goes."""

    def __init__(self, walk: Walk, nodes: Sequence[Node], constant: frozenset[str]) -> None:
        self._walk, self._constant = walk, constant
        self._last: set[str] = set()  # values that lie channels last
        self._readers = _readers(nodes)
        self._inside = _attention(nodes, self._readers) | _gates(nodes, self._readers)
        places = collections.defaultdict(int, {one.outputs[0]: at for at, one in enumerate(nodes)})
        self._added: dict[str, str] = {}  # what a convolution makes -> the sum that it makes as well
        for node in nodes:
            # The term that is made last makes the sum.
            for name in (
                sorted(node.inputs, key=places.__getitem__, reverse=True) if node.kind == "Add" else ()
            ):
                self._find_sum(nodes, node, name)

    def _find_sum(self, nodes: Sequence[Node], node: Node, name: str) -> None:
        maker = next((one for one in nodes if name in one.outputs), None)
        others = [one for one in node.inputs if one != name and one not in self._constant]
        alone = maker is not None and maker.kind in CONVOLUTIONS and len(self._readers[name]) == 1
        if alone and others and node.outputs[0] not in self._added.values():
            self._added[name] = node.outputs[0]

    def turn_inputs(self, nodes: Sequence[Node], inputs: Collection[str]) -> None:
        """What a convolution reads of the program's inputs is turned before anything else runs."""
        for node in nodes:
            if node.kind in CONVOLUTIONS and node.inputs[0] in inputs and node.inputs[0] not in self._last:
                self._walk.make(node.inputs[0])
                self._last.add(node.inputs[0])

    def operator(self, node: Node) -> None:
        walk, made = self._walk, [name for name in node.outputs if name]
        inputs = [name for name in node.inputs if name and name not in self._constant]
        if not made or not inputs:
            return
        if is_view(node):
            walk.view(made[0], inputs[0])
            walk.read(inputs)
        elif node.kind in CONVOLUTIONS:
            self._convolution(inputs[0], made[0])
        elif node.kind == "GroupNormalization":
            self._group_norm(inputs[0], made[0])
        elif node.kind == "QuantizeLinear":
            walk.make(made[0])
            self._last.add(made[0])
            walk.read(inputs)
        elif made[0] in self._added.values():
            self._sum(made[0], inputs)
        elif made[0] in self._inside:
            walk.make(made[0], 0)
            walk.read(inputs)
        elif node.kind in UNARY | BINARY | EITHER:
            if any(name in self._last for name in inputs):
                self._last.update(made)
            if node.kind in EITHER:
                walk.make(made[0])
            else:
                walk.over(made[0], inputs, again=True)
            walk.read(inputs)
        else:
            for name in made:
                walk.make(name)
            walk.read(inputs)

    def _convolution(self, x: str, made: str) -> None:
        walk = self._walk
        copy = None if x in self._last else walk.memory.take(walk.size(x))
        if copy is not None:
            walk.read([x])
        if made not in self._added:  # else the other term's memory takes it, see _sum
            walk.make(made)
            self._last.add(made)
        else:
            self._pending = walk.memory.take(walk.size(made))
            walk.make(made, 0)
            walk.memory.give(self._pending)
        if copy is not None:
            walk.memory.give(copy)
        else:
            walk.read([x])

    def _sum(self, made: str, inputs: Sequence[str]) -> None:
        """The sum lies where the other term lay, where that ends."""
        walk = self._walk
        others = [name for name in inputs if name not in self._added] or list(inputs[:1])
        if all(name in self._last for name in others):
            walk.over(made, others)
        else:
            walk.make(made)
        self._last.add(made)
        walk.read(inputs)

    def _group_norm(self, x: str, made: str) -> None:
        """A copy channels first, normalised into another; what follows number by number goes over that."""
        walk, size = self._walk, self._walk.size(x)
        first = walk.memory.take(size) if x in self._last else None
        if first is not None:
            walk.read([x])
        walk.make(made)
        if first is not None:
            walk.memory.give(first)
        else:
            walk.read([x])


def _readers(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    return readers


def _gates(nodes: Sequence[Node], readers: Mapping[str, Sequence[Node]]) -> set[str]:
    """sigmoid(x) of x * sigmoid(x), which is one operator."""
    return {
        node.outputs[0]
        for node in nodes
        if node.kind == "Sigmoid"
        and [one.kind for one in readers.get(node.outputs[0], ())] == ["Mul"]
        and node.inputs[0] in readers[node.outputs[0]][0].inputs
    }


def _attention(nodes: Sequence[Node], readers: Mapping[str, Sequence[Node]]) -> set[str]:
    """Scores and probabilities between two products: one operator does it all, row by row."""
    inside: set[str] = set()
    makers = {name: node for node in nodes for name in node.outputs}
    for node in nodes:
        if node.kind != "Softmax":
            continue
        inside.add(node.outputs[0])
        name = node.inputs[0]
        while name in makers and makers[name].kind in {"Mul", "Div", "MatMul", "Einsum"}:
            inside.add(name)
            if makers[name].kind in {"MatMul", "Einsum"}:
                break
            name = makers[name].inputs[0]
    return inside
