"""single_token_attention: attention over one key is that key's value, whatever the query.

softmax over one element is 1, so softmax(q k^T) v repeats v for every query, and the output projection of L equal
rows is one row: cross-attention on a single context token (BrainLDM, MAISI's masks, the default model) is a bias
that depends on the context alone. The pass keeps one row from the product up to the next operator that mixes in
another tensor (the residual addition), which broadcasts it. `hoist` then moves the whole chain to `prepare`.
"""

from __future__ import annotations

from math import prod

from torch.fx import GraphModule, Node

from ..graph import aten, clone, finish, is_size, shape_of, symbol

POINTWISE = {aten.linear.default}


def _one_key(node: Node) -> bool:
    """A softmax over an axis of fixed size 1."""
    if node.target not in (aten.softmax.int, aten._softmax.default):
        return False
    axis = node.args[1]
    return isinstance(axis, int) and shape_of(node)[axis] == 1


def _value_of(product: Node, scores: Node) -> Node | None:
    """v [N, H, 1, D] (or [N*H, 1, D]) where `product` is scores @ v."""
    if product.target is aten.einsum.default:
        equation, operands = product.args[:2]
        left, right = str(equation).split("->")[0].split(",")
        matches = operands[0] is scores and left[:-1] == right[: len(left) - 2] + left[-2]  # type: ignore[index]
        matches = matches and right[-2] == left[-1] and str(equation).endswith(left[:-1] + right[-1])
        return operands[1] if matches else None  # type: ignore[index, return-value]
    if product.target in (aten.matmul.default, aten.bmm.default) and product.args[0] is scores:
        return product.args[1]  # type: ignore[return-value]
    return None


def _row_view(node: Node, axis: int) -> tuple[list[object], int] | None:
    """The view's target shape with one row, and where the row axis goes; None if the axis is merged or split."""
    source: Node = node.args[0]  # type: ignore[assignment]
    before, after = shape_of(source), shape_of(node)
    sizes = list(node.args[1])  # type: ignore[arg-type]
    for position, size in enumerate(after):
        if symbol(size) == symbol(before[axis]) and symbol(prod(after[:position])) == symbol(prod(before[:axis])):
            sizes[position] = 1
            if any(isinstance(s, int) and s == -1 for s in sizes):
                return None
            return sizes, position
    return None


def _collapse(graph_module: GraphModule, product: Node, value: Node) -> bool:
    """Replace `product` by one row of it; False (and nothing changed) if its readers do not allow that."""
    graph = graph_module.graph
    chain: list[tuple[Node, object]] = []
    node, axis = product, len(shape_of(product)) - 2
    while True:
        if len(node.users) != 1:
            return False
        user = next(iter(node.users))
        if user.target is aten.add.Tensor and axis == len(shape_of(user)) - 2:
            break
        if user.target is aten.permute.default:
            axis = list(user.args[1]).index(axis)  # type: ignore[arg-type]
            chain.append((user, user.args[1]))
        elif user.target is aten.transpose.int:
            swap = {d % len(shape_of(user)): e % len(shape_of(user)) for d, e in (user.args[1:], user.args[:0:-1])}
            axis = swap.get(axis, axis)
            chain.append((user, user.args[1:]))
        elif user.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
            view = _row_view(user, axis)
            if view is None:
                return False
            axis = view[1]
            chain.append((user, view[0]))
        elif user.target in POINTWISE and user.args[0] is node and axis != len(shape_of(user)) - 1:
            chain.append((user, None))
        else:
            return False
        node = user
    row = value
    for old, argument in chain:
        with graph.inserting_before(old):
            if old.target in POINTWISE:
                arguments = (row, *old.args[1:])
            elif old.target is aten.transpose.int:
                arguments = (row, *argument)  # type: ignore[misc]
            else:
                arguments = (row, argument)
            new = graph.call_function(old.target, arguments, dict(old.kwargs))  # type: ignore[arg-type]
            meta = [a.meta["val"] if isinstance(a, Node) else a for a in arguments]
            meta = [[s.meta["val"] if isinstance(s, Node) else s for s in a] if isinstance(a, list) else a for a in meta]
            new.meta["val"] = old.target(*meta)  # type: ignore[operator]
        row = new
    node.replace_all_uses_with(row)
    return True


def single_token_attention(graph_module: GraphModule) -> GraphModule:
    """Attention whose softmax runs over one key becomes a broadcast row."""
    result = clone(graph_module)
    for scores in [node for node in result.graph.nodes if not is_size(node) and _one_key(node)]:
        for product in list(scores.users):
            value = _value_of(product, scores)
            if value is not None and _collapse(result, product, value):
                result = finish(result)
    return finish(result)
