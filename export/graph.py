"""What the passes share: reading and editing captured graphs (`torch.fx.GraphModule` over aten operators)."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def argument(node: Node, index: int, default: Any = None) -> Any:
    """A positional argument of an operator, or `default` where the call leaves it out."""
    return node.args[index] if len(node.args) > index else default


def is_size(node: Node) -> bool:
    """A size (an int computed from shapes), not a tensor."""
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def is_parameter(node: Node) -> bool:
    return node.op == "get_attr"


def shape_of(node: Node) -> tuple[int | torch.SymInt, ...]:
    """The node's shape; symbolic where the size is free."""
    return tuple(node.meta["val"].shape)


def is_free(size: object) -> bool:
    """A symbolic size."""
    return isinstance(size, torch.SymInt)


def hint(size: int | torch.SymInt) -> int:
    """The size at which the graph was captured."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def symbol(size: int | torch.SymInt) -> str:
    """A size as text, equal for equal expressions: `4`, `s0`, `2*s0`."""
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


def parameter(graph_module: GraphModule, node: Node) -> Tensor:
    """The tensor behind a `get_attr` node."""
    value = operator.attrgetter(str(node.target))(graph_module)
    assert isinstance(value, Tensor)
    return value


def add_parameter(graph_module: GraphModule, name: str, value: Tensor) -> Node:
    """A new constant, as a `get_attr` node at the current insertion point."""
    unique = name.replace(".", "_")
    while hasattr(graph_module, unique):
        unique += "_"
    graph_module.register_buffer(unique, value.contiguous())
    node = graph_module.graph.get_attr(unique)
    node.meta["val"] = fake_mode(graph_module).from_tensor(value)
    return node


def fake_mode(graph_module: GraphModule) -> FakeTensorMode:
    """The mode in which the graph was captured: where its symbolic sizes live."""
    mode = next(iter(inputs(graph_module).values())).meta["val"].fake_mode
    assert isinstance(mode, FakeTensorMode)
    return mode


def clone(graph_module: GraphModule) -> GraphModule:
    """A copy whose graph may be edited; the weights are shared, not copied."""
    nodes: dict[Node, Node] = {}
    graph = Graph()
    output = graph.graph_copy(graph_module.graph, nodes)
    graph.output(output)
    for old, new in nodes.items():
        new.meta = copy.copy(old.meta)
    return GraphModule(graph_module, graph)


def finish(graph_module: GraphModule) -> GraphModule:
    """Drop what is no longer used, check, and recompile."""
    graph_module.graph.eliminate_dead_code()
    used = {str(node.target) for node in graph_module.graph.nodes if is_parameter(node)}
    result = GraphModule({name: operator.attrgetter(name)(graph_module) for name in used}, graph_module.graph)
    result.graph.lint()
    result.recompile()
    return result


def inputs(graph_module: GraphModule) -> dict[str, Node]:
    """Placeholders by name, in order."""
    return {str(node.target): node for node in graph_module.graph.nodes if node.op == "placeholder"}


def outputs(graph_module: GraphModule) -> tuple[Node, ...]:
    """What the graph returns, in order."""
    value = argument(next(iter(reversed(graph_module.graph.nodes))), 0)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def count_nodes(graph_module: GraphModule) -> int:
    """Operators that compute a tensor (sizes and tuple elements are not work)."""
    nodes = graph_module.graph.nodes
    return sum(n.op == "call_function" and not is_size(n) and n.target is not operator.getitem for n in nodes)


def count_flops(graph_module: GraphModule, examples: Iterable[Tensor]) -> int:
    """FLOPs of one run on tensors of these shapes, a multiply-add counted as two (convolutions and products)."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FlopCounterMode(display=False) as counter:
        graph_module(*(mode.from_tensor(example) for example in examples))
    return int(counter.get_total_flops())


def evaluate(graph_module: GraphModule, node: Node, known: dict[Node, Tensor]) -> Tensor:
    """The value of a node that depends on no input."""
    if node not in known:
        if is_parameter(node):
            known[node] = parameter(graph_module, node)
        else:
            arguments = [
                torch.fx.node.map_arg(a, lambda n: evaluate(graph_module, n, known)) for a in node.args
            ]
            keywords = {
                key: torch.fx.node.map_arg(a, lambda n: evaluate(graph_module, n, known))
                for key, a in node.kwargs.items()
            }
            target: Any = node.target
            known[node] = target(*arguments, **keywords)
    return known[node]
