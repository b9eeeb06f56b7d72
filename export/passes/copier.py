"""Copies a part of a captured graph into a program of its own."""

from __future__ import annotations

import operator
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from volcast.export.graph import aten, inputs, is_free, is_size, shape_of, symbol


class Copier:
    """Copies nodes of one graph into another; sizes are recomputed from the new graph's own inputs."""

    def __init__(
        self, source: GraphModule, names: Sequence[str], made: Container[Node] = frozenset()
    ) -> None:
        """`made`: the tensors that the new graph computes, whose sizes it can read off them."""
        self._made = made
        self.graph = Graph()
        self.copies: dict[Node, Node] = {}
        self.leaves: dict[str, tuple[Node, int]] = {}
        placeholders = inputs(source)
        for name in names:
            self.add_input(name, placeholders[name])

    def add_input(self, name: str, like: Node) -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = like.meta["val"]
        self.copies[like] = node
        for axis, size in enumerate(shape_of(like)):
            if is_free(size):
                self.leaves.setdefault(symbol(size), (node, axis))
        return node

    def copy(self, node: Node) -> Node:
        """The node's copy, its sources copied before it (iteratively: graphs are deeper than Python's stack)."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self.copies:
                stack.pop()
            elif is_size(current) and (size := self._own_size(current)) is not None:
                self.copies[current] = size
            else:
                missing = [source for source in current.all_input_nodes if source not in self.copies]
                if missing:
                    stack.extend(missing)
                    continue
                self.copies[current] = self.graph.node_copy(current, self.copies.__getitem__)
        return self.copies[node]

    def _own_size(self, node: Node) -> Node | None:
        """A size read off an input: that very one, or one of which it is a whole part (a latent's beside an image's)."""
        wanted = node.meta["val"]
        if not is_free(wanted):
            return None
        if symbol(wanted) in self.leaves:
            return self._size(*self.leaves[symbol(wanted)], wanted)
        if self._readable(node):
            return None
        for place, axis in self.leaves.values():
            whole = shape_of(place)[axis]
            parts = whole.node.expr / wanted.node.expr if isinstance(whole, torch.SymInt) else None
            if parts is not None and parts.is_Integer:
                part = self.graph.call_function(
                    operator.floordiv, (self._size(place, axis, whole), int(parts))
                )
                part.meta["val"] = wanted
                return part
        return None

    def _size(self, place: Node, axis: int, value: Any) -> Node:
        size = self.graph.call_function(aten.sym_size.int, (place, axis))
        size.meta["val"] = value
        return size

    def _readable(self, node: Node) -> bool:
        """Whether all that the size is computed from is made here."""
        return all(
            self._readable(source) if is_size(source) else source in self._made or source in self.copies
            for source in node.all_input_nodes
        )

    def call(self, target: Any, arguments: tuple[Any, ...]) -> Node:
        """A new operator, with the value that it would have."""
        node = self.graph.call_function(target, arguments)
        node.meta["val"] = target(*torch.fx.node.map_arg(arguments, lambda source: source.meta["val"]))
        return node
