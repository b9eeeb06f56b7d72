"""From a network to a captured graph: `torch.export`, with free batch and spatial sizes where the network allows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch.export import Dim
from torch.fx import GraphModule, Node

from .graph import add_parameter, argument, aten, evaluate, finish, is_parameter, symbol

IDENTITIES = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}
"""Operators that give back their first argument when a trained network runs."""

CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default}

FRESH = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d", "group_norm", "instance_norm",
    "layer_norm", "silu", "gelu", "relu", "leaky_relu", "sigmoid", "exp", "sin", "cos", "add", "sub", "mul", "div", "matmul", "bmm", "einsum",
    "softmax", "scaled_dot_product_attention", "cat", "embedding", "clone", "avg_pool2d", "avg_pool3d",
    "upsample_nearest2d", "upsample_nearest3d",
}  # fmt: skip
"""Operators whose result shares no memory with what they read."""

CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
}


class _ByName(nn.Module):
    """Takes the inputs as one mapping, so that a network with `*args` captures as any other."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tensors: dict[str, Tensor]) -> object:
        return self.network(*tensors.values())


def capture(
    network: nn.Module,
    examples: Mapping[str, Tensor],
    free: Mapping[str, Mapping[int, str]],
    multiples: Mapping[str, int],
    beside: Mapping[str, str] = MappingProxyType({}),
) -> GraphModule:
    """The network as a graph of aten operators whose inputs are named as in `examples`, in that order.

    `free` gives, per input, the name of each axis that may vary; equal names are equal sizes, and an axis in
    `multiples` is a multiple of that number; `beside` names for an axis of `multiples` another one, of which it holds
    as many multiples (an image's size beside its latent's). An axis that the network itself fixes (a positional table, a reshape
    to a constant) stays fixed. Raises ValueError where the network cannot be captured at all. Operators that only
    check or pass their argument on are removed, and what depends on no input is computed now.
    """
    related = {*beside, *beside.values()}
    blocks = {name: Dim(f"{name}_blocks", min=1) for name in multiples}
    dims = {
        name: multiple * blocks[beside.get(name, name)] if multiple > 1 else blocks[beside.get(name, name)]
        for name, multiple in multiples.items()
        if multiple > 1 or name in related
    }
    dynamic = {
        name: {axis: dims.get(free.get(name, {}).get(axis, ""), Dim.AUTO) for axis in free.get(name, {})}
        for name in examples
    }
    # With symbolic sizes torch's cache of fake results costs more than it saves: a fifth of the capture.
    uncached = dynamo.patch(fake_tensor_cache_enabled=False)
    with warnings.catch_warnings(), torch.no_grad(), uncached:
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                _ByName(network).eval(), (dict(examples),), dynamic_shapes=(dynamic,), strict=False
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"[capture] {type(network).__name__}: torch.export failed: {reason}") from error
        captured = program.module(check_guards=False)
    assert isinstance(captured, GraphModule)
    return tidied(captured, tuple(examples))


def tidied(captured: GraphModule, names: Sequence[str]) -> GraphModule:
    """A traced graph with its inputs named, without what changes nothing, and what depends on no input computed."""
    captured.graph.set_codegen(torch.fx.graph.CodeGen())
    return fold_constants(_rename(_simplify(_without_mutation(captured)), names))


def _is_identity(node: Node) -> bool:
    if node.target in IDENTITIES:
        return True
    source = argument(node, 0)
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), Tensor):
        return False
    before, after = source.meta["val"], node.meta["val"]
    if node.target is aten.slice.Tensor:
        end = argument(node, 3)
        whole = argument(node, 2) in (0, None) and (end is None or (isinstance(end, int) and end >= 2**62))
        return whole and argument(node, 4, 1) == 1
    if node.target in CASTS:
        return bool(before.dtype == after.dtype)
    if node.target in (aten.expand.default, aten.reshape.default, aten.view.default):
        return [symbol(s) for s in before.shape] == [symbol(s) for s in after.shape]
    return False


def _owns_memory(node: Node) -> bool:
    """What it gives shares no memory with a value that anybody else reads."""
    source = argument(node, 0) if node.target in IDENTITIES else None
    if isinstance(source, Node) and len(source.users) == 1:  # `contiguous`, of a value that only it reads
        return _owns_memory(source)
    return str(node.target).removeprefix("aten.").split(".")[0] in FRESH


def _without_mutation(graph_module: GraphModule) -> GraphModule:
    """`a.add_(b)` becomes `a.add(b)` for every later reader of a (MAISI adds its class embedding in place).

    Allowed only where what is written to, and what read it before, are known to own their memory; else ValueError.
    """
    order = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    for node in list(graph_module.graph.nodes):
        name, _, overload = str(node.target).removeprefix("aten.").partition(".")
        if not str(node.target).startswith("aten.") or not name.endswith("_") or name.endswith("__"):
            continue
        written: Node = argument(node, 0)
        earlier = [user for user in written.users if order[user] < order[node]]
        if not all(_owns_memory(one) for one in (written, *earlier)):
            raise ValueError(f"[capture] {node.target} writes into {written.target}, which others read")
        node.target = getattr(getattr(aten, name[:-1]), overload)
        later = [user for user in written.users if user is not node and order[user] > order[node]]
        for user in later:
            user.replace_input_with(written, node)
    return finish(graph_module)


def _simplify(graph_module: GraphModule) -> GraphModule:
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in CHECKS:
            graph_module.graph.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    return finish(graph_module)


def _rename(graph_module: GraphModule, names: Sequence[str]) -> GraphModule:
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(names)
    for node, name in zip(placeholders, names, strict=True):
        node.target = node.name = name
    return finish(graph_module)


def _is_tensor(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)


def fold_constants(graph_module: GraphModule) -> GraphModule:
    """Compute now what depends on no input (rate: once per model)."""
    constant: set[Node] = set()
    known: dict[Node, Tensor] = {}
    for node in graph_module.graph.nodes:
        sources = node.all_input_nodes
        if is_parameter(node) or _is_tensor(node) and all(s in constant for s in sources):
            constant.add(node)
    for node in list(graph_module.graph.nodes):
        if node in constant and not is_parameter(node) and any(user not in constant for user in node.users):
            value = evaluate(graph_module, node, known)
            with graph_module.graph.inserting_before(node):
                node.replace_all_uses_with(add_parameter(graph_module, f"folded_{node.name}", value))
    return finish(graph_module)
