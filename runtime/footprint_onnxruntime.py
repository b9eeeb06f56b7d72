"""The memory of ONNX Runtime's CPU provider (1.22 to 1.32), from a program's operators and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .arena import Arena
from .footprint import EngineMemory, Footprint
from .liveness import Memory, Walk, constant_values, is_view, weight_bytes
from .onnx_graph import Node, OnnxGraph
from .onnx_shapes import Sized

NODE = 16 * 2**10
"""Bytes of an operator: its kernel, names and plans. Measured, as the next two."""
SESSION = 2**20
LIBRARY = 10 * 2**20
"""What the first session of a process takes besides: pages of the library, the pool of threads."""


def footprint(graph: OnnxGraph, values: Mapping[str, Sized]) -> Footprint:
    """With an arena, which keeps what it has, the program's outputs too; without reuse and memory pattern."""
    arena = Arena()
    run(graph, values, arena)
    weights = weight_bytes(graph, values)
    largest = max((values[name].bytes for name in graph.constants), default=0)
    held = SESSION + weights + NODE * len(graph.nodes) + arena.touched + arena.bookkeeping
    return Footprint(opening=largest, held=held, call=0)


MEMORY = EngineMemory(library_bytes=LIBRARY, footprint=footprint)


def run(graph: OnnxGraph, values: Mapping[str, Sized], memory: Memory) -> None:
    """Takes and gives back what a call does."""
    constant = constant_values(graph)
    nodes = _with_silu([node for node in _order(graph) if not constant.issuperset(node.outputs)])
    walk = Walk(nodes, graph, values, memory)
    for node in nodes:
        _operator(walk, node, [name for name in node.inputs if name and name not in constant])


def _order(graph: OnnxGraph) -> list[Node]:
    """What an operator reads comes before it, its first input's makers first."""
    maker = {name: node for node in graph.nodes for name in node.outputs}
    done: set[str] = set()
    found: list[Node] = []
    stack: list[tuple[Node, bool]] = [
        (maker[name], False) for name in reversed(graph.outputs) if name in maker
    ]
    while stack:
        node, ready = stack.pop()
        if node.outputs[0] in done:
            continue
        if ready:
            done.add(node.outputs[0])
            found.append(node)
            continue
        stack.append((node, True))
        stack += [(maker[name], False) for name in reversed(node.inputs) if name in maker]
    return found


def _with_silu(nodes: list[Node]) -> list[Node]:
    """x * sigmoid(x) is one operator."""
    readers: dict[str, int] = {}
    for node in nodes:
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    gates = {
        node.outputs[0]: node.inputs[0]
        for node in nodes
        if node.kind == "Sigmoid" and readers.get(node.outputs[0]) == 1
    }
    fused: dict[str, Node] = {}
    for node in nodes:
        if node.kind == "Mul" and len(node.inputs) == 2:
            for gate, x in (node.inputs, node.inputs[::-1]):
                if gates.get(gate) == x:
                    fused[node.outputs[0]] = Node(
                        kind="QuickGelu", inputs=(x,), outputs=node.outputs, attributes={}
                    )
                    del gates[gate]
                    fused[gate] = fused[node.outputs[0]]
    return [
        fused.get(node.outputs[0], node)
        for node in nodes
        if node.kind != "Sigmoid" or node.outputs[0] not in fused
    ]


def _operator(walk: Walk, node: Node, inputs: list[str]) -> None:
    made = [name for name in node.outputs if name]
    if is_view(node) and inputs:
        walk.view(made[0], inputs[0])
        walk.read(inputs)
        return
    if node.kind == "GroupNormalization":
        _group_norm(walk, inputs[0], made[0])
        return
    if node.kind == "Conv" and len(walk.values[made[0]].shape) == 4:
        _blocked_convolution(walk, inputs, made[0])
        return
    if node.kind == "Einsum":  # works on copies in another order, and turns the result twice
        walk.scratch(*(walk.size(name) for name in inputs), 2 * walk.size(made[0]), walk.size(made[0]))
    for name in made:
        walk.make(name)
    if node.kind == "ConvTranspose":
        weight, x = walk.values[node.inputs[1]].shape, walk.values[inputs[0]].shape
        columns = math.prod(weight[1:]) * math.prod(x[2:])
        if math.prod(weight[2:]) > 1:
            walk.scratch(4 * columns)
    walk.read(inputs)


def _group_norm(walk: Walk, x: str, made: str) -> None:
    """The function's body: a cast, x - mean, x * x, and a cast of the result; the rest in place."""
    size, memory = walk.size(x), walk.memory
    widened = memory.take(size)
    walk.read([x])
    apart = memory.take(size)
    walk.scratch(size)
    memory.give(widened)
    walk.make(made)
    memory.give(apart)


def _blocked_convolution(walk: Walk, inputs: list[str], made: str) -> None:
    """Two axes: the input is put into blocks of channels, the output back."""
    blocked = walk.memory.take(walk.size(inputs[0]))
    walk.read(inputs)
    result = walk.memory.take(walk.size(made))
    walk.memory.give(blocked)
    walk.make(made)
    walk.memory.give(result)
