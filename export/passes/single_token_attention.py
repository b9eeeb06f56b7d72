"""single_token_attention: attention over one key is that key's value, whatever the query.

softmax over one element is 1, so softmax(q k^T) v repeats v for every query, and the output projection of L equal
rows is one row: cross-attention on a single context token (BrainLDM, MAISI's masks, the default model) is a bias
that depends on the context alone. The pass keeps one row from the product up to the next operator that mixes in
another tensor (the residual addition), which broadcasts it. `hoist` then moves the whole chain to `prepare`.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch.fx import Graph, GraphModule, Node

from volcast.export.graph import argument, aten, clone, finish, shape_of, symbol

VIEWS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}


def single_token_attention(graph_module: GraphModule) -> GraphModule:
    """Attention whose softmax runs over one key becomes a broadcast row."""
    result = clone(graph_module)
    for scores in [node for node in result.graph.nodes if _one_key(node)]:
        for product in list(scores.users):
            value = _value_of(product, scores)
            if value is not None:
                _keep_one_row(result.graph, product, value)
    for attention in [node for node in result.graph.nodes if _one_key_fused(node)]:
        _keep_one_row(result.graph, attention, argument(attention, 2))
    return finish(result)


def _one_key(node: Node) -> bool:
    """A softmax over an axis of fixed size 1."""
    rank = len(shape_of(node)) if node.target is aten.softmax.int else 0
    return rank > 0 and argument(node, 1) % rank == rank - 1 and shape_of(node)[-1] == 1


def _one_key_fused(node: Node) -> bool:
    """Scaled dot-product attention over one key, without a mask (the weight is then exactly 1)."""
    if node.target is not aten.scaled_dot_product_attention.default or argument(node, 3) is not None:
        return False
    return shape_of(argument(node, 1))[-2] == 1 and not argument(node, 5, False)


def _value_of(product: Node, scores: Node) -> Node | None:
    """v [.., 1, D] where `product` is scores [.., L, 1] @ v."""
    if product.target is aten.einsum.default:
        equation, operands = argument(product, 0), argument(product, 1)
        left, right, result = equation.replace("->", ",").split(",")
        is_product = (*left, *right[-2:]) == (*result[:-1], right[-2], right[-2], result[-1])
        return operands[1] if is_product and left[:-2] == right[:-2] and operands[0] is scores else None
    if product.target in (aten.matmul.default, aten.bmm.default) and argument(product, 0) is scores:
        value: Node = argument(product, 1)
        return value
    return None


def _keep_one_row(graph: Graph, product: Node, value: Node) -> None:
    """Replace `product`, and what only rearranges or projects its rows, by one row; nothing if a reader forbids it."""
    chain = _row_chain(product)
    same_heads = [symbol(s) for s in shape_of(value)[:-2]] == [symbol(s) for s in shape_of(product)[:-2]]
    if chain is None or not same_heads:
        return
    row = value
    for node, arguments in chain:
        with graph.inserting_before(node):
            target: Any = node.target
            new = graph.call_function(target, (row, *arguments), dict(node.kwargs))
        operands = [a.meta["val"] if isinstance(a, Node) else a for a in new.args]
        sizes = [
            [s.meta["val"] if isinstance(s, Node) else s for s in a] if isinstance(a, list) else a
            for a in operands
        ]
        new.meta["val"] = target(*sizes, **node.kwargs)
        row = new
    last = chain[-1][0] if chain else product
    last.replace_all_uses_with(row)


def _row_chain(product: Node) -> list[tuple[Node, tuple[Any, ...]]] | None:
    """The operators between the product and the addition that broadcasts, with their arguments for one row."""
    chain: list[tuple[Node, tuple[Any, ...]]] = []
    node, axis = product, len(shape_of(product)) - 2
    while len(node.users) == 1:
        user = next(iter(node.users))
        rank = len(shape_of(user))
        if user.target is aten.add.Tensor and axis == rank - 2:
            other = argument(user, 1) if argument(user, 0) is node else argument(user, 0)
            full = isinstance(other, Node) and other is not node and shape_of(other) == shape_of(user)
            return chain if full else None
        if user.target is aten.permute.default:
            order = argument(user, 1)
            axis = list(order).index(axis)
            chain.append((user, (order,)))
        elif user.target is aten.transpose.int:
            first, second = (argument(user, i) % rank for i in (1, 2))
            axis = {first: second, second: first}.get(axis, axis)
            chain.append((user, (first, second)))
        elif user.target in VIEWS:
            view = _row_view(node, user, axis)
            if view is None:
                return None
            sizes, axis = view
            chain.append((user, (sizes,)))
        elif user.target is aten.linear.default and argument(user, 0) is node and axis != rank - 1:
            chain.append((user, user.args[1:]))
        else:
            return None
        node = user
    return None


def _row_view(source: Node, view: Node, axis: int) -> tuple[list[Any], int] | None:
    """The view's sizes with one row and where its row axis goes; None if the view merges or splits that axis."""
    before, after = shape_of(source), shape_of(view)
    sizes = list(argument(view, 1))
    if any(isinstance(size, int) and size == -1 for size in sizes):
        return None
    for position, size in enumerate(after):
        if symbol(size) == symbol(before[axis]) and symbol(prod(after[:position])) == symbol(
            prod(before[:axis])
        ):
            sizes[position] = 1
            return sizes, position
    return None
