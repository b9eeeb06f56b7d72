"""reuse: cut a step so that most of the network may be left out of a step, its last feature kept from one before.

    deep:    x, row, constants -> out, feature    the whole step, and what its outermost skip connection is joined to
    shallow: x, row, constants, feature -> out    from there on: first convolution, last residual block, output head

DeepCache (arXiv:2312.00858): of a UNet's features those that have gone through the lower levels change slowly along a
trajectory, so that an earlier step's stands for this one's. The cut follows data flow: the feature is what the last
concatenation joins to a skip connection, where one has passed through a smaller grid and the other has not. It lies
inside the top level, whose other blocks are left out too. Both programs share the step's weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from volcast.export.graph import argument, aten, finish, hint, inputs, is_size, outputs, shape_of, symbol

from .copier import Copier
from .hoist import SAMPLE

FEATURE = "feature"
SHRINKING = {
    aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv3d.padding, aten.convolution.default,
    aten.avg_pool2d.default, aten.avg_pool3d.default, aten.max_pool2d.default, aten.max_pool3d.default,
}  # fmt: skip
"""Operators that can make a smaller grid of a larger one."""


@dataclass(frozen=True, kw_only=True)
class ReuseCut:
    """The two programs; `channels` of the feature `[batch, channels, *x's spatial sizes]`."""

    deep: GraphModule
    shallow: GraphModule
    channels: int


def reuse(step: GraphModule) -> ReuseCut:
    """Cut a step, as `hoist` makes it.

    Raises ValueError where it has no such feature, or what comes after it needs a smaller grid once more.
    """
    x = inputs(step)[SAMPLE]
    (result,) = outputs(step)
    moving = _depending(step, {x})
    below = _depending(step, {node for node in moving if _shrinks(node)})
    if not below:
        raise _refused("the network has one level, and nothing below it that could be kept")
    feature = _feature(step, moving, below)
    sizes = [symbol(size) for size in shape_of(feature)[2:]]
    if sizes != [symbol(size) for size in shape_of(x)[2:]]:
        raise _refused(
            f"its outermost skip connection joins {tuple(shape_of(feature))}, which is not of x's sizes"
        )

    whole = Copier(step, tuple(inputs(step)), moving)
    whole.graph.output((whole.copy(result), whole.copy(feature)))
    top = Copier(step, tuple(inputs(step)), moving)
    top.add_input(FEATURE, feature)
    top.graph.output((top.copy(result),))
    if any(_shrinks(node) for node in top.graph.nodes):
        raise _refused("what follows its outermost skip connection reads a smaller grid past it")
    for place in list(top.graph.nodes):
        if place.op == "placeholder" and not place.users:
            top.graph.erase_node(place)
    return ReuseCut(
        deep=finish(GraphModule(step, whole.graph)),
        shallow=finish(GraphModule(step, top.graph)),
        channels=int(shape_of(feature)[1]),
    )


def _feature(step: GraphModule, moving: set[Node], below: set[Node]) -> Node:
    """What the last concatenation joins to a tensor that depends on x, but not by way of a smaller grid."""
    for node in reversed(step.graph.nodes):
        if node.target is aten.cat.default and argument(node, 1, 0) == 1:
            joined = [part for part in argument(node, 0) if part in moving]
            deep: list[Node] = [part for part in joined if part in below]
            if len(deep) == 1 and len(joined) > 1:
                return deep[0]
    raise _refused("no skip connection of its top level is concatenated to what comes up from below")


def _depending(step: GraphModule, found: set[Node]) -> set[Node]:
    """The tensors `found` and all that depend on them."""
    found = set(found)
    for node in step.graph.nodes:
        if node.op == "call_function" and not is_size(node) and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _shrinks(node: Node) -> bool:
    if node.target not in SHRINKING:
        return False
    before, after = shape_of(argument(node, 0))[2:], shape_of(node)[2:]
    return all(hint(small) < hint(large) for small, large in zip(after, before, strict=True))


def _refused(why: str) -> ValueError:
    return ValueError(f"[reuse] {why}: need a UNet of two levels or more; export without --reuse")
