"""Which operators of a decoder's graph work row by row, and how many rows around its own each of them reads.

A row is one position along the first spatial axis: a plane of a volume, a line of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from volcast.runtime.liveness import constant_values
from volcast.runtime.onnx_graph import Node, OnnxGraph
from volcast.runtime.onnx_shapes import BINARY, UNARY, Sized, sized_values

PAIR = {"QuantizeLinear", "DequantizeLinear"}
"""Round to int8 and back, number by number; zero stays zero (export/qdq.py)."""
KEEPS_ZERO = {"Relu", "LeakyRelu", "Gelu", "Tanh", "Identity"} | PAIR
PROBES = ((3, 4, 5), (4, 7, 3))
"""Latent sizes at which values are looked at: what is a multiple of both is one at every size."""


@final
@dataclass(frozen=True)
class Window:
    """How an operator's rows depend on rows of its first input: `before` and `after` more of them; `scale` rows of
    the output stand over one of the input."""

    before: int
    after: int
    scale: int
    edge: bool = False


@final
class GraphRows:
    """A decoder's graph, from one latent to one image.

    Attributes:
        values: shape and dtype of every value at the first of `PROBES`.
        scales: of every volume, by how much each spatial axis is larger than the latent's.
        constants: values that depend on weights alone.
    """

    def __init__(self, graph: OnnxGraph, latent_channels: int, axes: int) -> None:
        """Raises ValueError for a graph with several inputs or outputs, or operators whose sizes are not known."""
        if len(graph.inputs) != 1 or len(graph.outputs) != 1:
            raise ValueError("[slabs] a decoder with more inputs or outputs than one cannot be cut")
        (self.input,), (self.output,) = graph.inputs, graph.outputs
        self.graph = graph
        probes = [sizes[:axes] for sizes in PROBES]
        found = [sized_values(graph, {self.input: (1, latent_channels, *sizes)}) for sizes in probes]
        self.values = found[0]
        self.scales = {
            name: scale
            for name in found[0]
            if (scale := _scale([(values[name], sizes) for values, sizes in zip(found, probes, strict=True)]))
        }
        self.constants = constant_values(graph)
        self.maker = {name: place for place, node in enumerate(graph.nodes) for name in node.outputs}
        self._turned = self._find_turned()

    def window(self, node: Node) -> Window | None:
        """The window of an operator that reads rows nearby or changes their number; None for any other."""
        if node.kind == "Conv":
            kernel, pads = self._kernel(node), node.numbers("pads", (0,))
            before, after = pads[0], pads[len(pads) // 2]
            same = node.numbers("strides", (1,))[0] == 1 and before + after == kernel - 1
            return Window(before, after, 1) if same and kernel > 1 else None
        if node.kind == "ConvTranspose":
            kernel, pads, stride = (
                self._kernel(node),
                node.numbers("pads", (0,)),
                node.numbers("strides", (1,))[0],
            )
            before, after = pads[0], pads[len(pads) // 2]
            extra = node.numbers("output_padding", (0,))[0]
            if kernel + extra != stride + before + after:
                return None
            # Row i adds to the rows i * stride - before + (0 .. kernel - 1).
            return Window((kernel - 1 - before) // stride, (before - 1) // stride + 1, stride)
        if node.kind == "Resize":
            return self._resize(node)
        return None

    def _kernel(self, node: Node) -> int:
        taps = self.values[node.inputs[1]].shape[2]
        return node.numbers("dilations", (1,))[0] * (taps - 1) + 1

    def _resize(self, node: Node) -> Window | None:
        before, after = self.scales.get(node.inputs[0]), self.scales.get(node.outputs[0])
        scales = self.graph.constants.get(node.inputs[2]) if len(node.inputs) > 2 else None
        if before is None or after is None or scales is None or after[0] % before[0]:
            return None
        ways = (
            node.attributes.get("mode"),
            node.attributes.get("coordinate_transformation_mode", "half_pixel"),
        )
        rounding = node.attributes.get("nearest_mode", "round_prefer_floor")
        if ways == ("nearest", "asymmetric") and rounding == "floor":
            return Window(0, 0, after[0] // before[0])
        return Window(1, 1, after[0] // before[0], edge=True) if ways == ("linear", "half_pixel") else None

    def is_local(self, node: Node) -> bool:
        """Whether rows of the output need rows nearby alone."""
        if node.kind in PAIR:  # the int8 values between the two have no scale: they are never stored
            volumes = {node.inputs[0], node.outputs[0]}
            return not self.scales.keys().isdisjoint(volumes) and self.constants.issuperset(node.inputs[1:])
        if node.outputs[0] in self._turned:
            return True
        if any(name not in self.scales for name in node.outputs):
            return False
        if node.kind in ("Conv", "ConvTranspose", "Resize"):
            fixed = all(name in self.constants for name in node.inputs[1:] if name)
            pointwise = node.kind == "Conv" and self._kernel(node) == 1 and self._keeps_rows(node)
            return node.inputs[0] in self.scales and fixed and (pointwise or self.window(node) is not None)
        if node.kind == "GroupNormalization":
            return node.inputs[0] in self.scales
        if node.kind == "Concat":
            rank = len(self.values[node.outputs[0]].shape)
            return node.number("axis", 0) % rank == 1 and self._spread(node)
        return node.kind in UNARY | BINARY and self._spread(node)

    def _find_turned(self) -> set[str]:
        """Values on a way from a volume through other orders of its axes back to a volume, row by row: how a VQVAE takes
        each vector of a latent to its nearest code. They are never stored: they have no scale."""
        found: set[str] = set()
        axes: dict[str, int] = {}  # of the rows, in values that are no volumes
        for node in self.graph.nodes:
            axis = self._row_axis(node, axes)
            if axis is None:
                continue
            name = node.outputs[0]
            if name not in self.scales:
                axes[name] = axis
            elif axis == 2 and node.inputs[0] in axes:
                waiting = [name]
                while waiting:
                    found.add(name := waiting.pop())
                    waiting += [one for one in self.graph.nodes[self.maker[name]].inputs if one in axes]
        return found

    def _row_axis(self, node: Node, axes: Mapping[str, int]) -> int | None:
        """The rows' axis in what an operator makes of one value that is not in a volume's order, or takes to another;
        None where it mixes rows."""
        known = {name: 2 if name in self.scales else axes.get(name) for name in node.inputs}
        varying = [name for name in node.inputs if name and name not in self.constants]
        if len(varying) != 1 or (axis := known[varying[0]]) is None:
            return None
        name, rank = varying[0], len(self.values[varying[0]].shape)
        if node.kind == "Transpose":
            return node.numbers("perm", tuple(reversed(range(rank)))).index(axis)
        if node.kind == "ArgMin":
            over = node.number("axis", 0) % rank
            return None if over == axis else axis - (over < axis and not node.number("keepdims", 1))
        if name in self.scales:
            return None
        if node.kind == "Gather":
            return axis if name == node.inputs[1] and node.number("axis", 0) == 0 else None
        if node.kind == "MatMul":
            return axis if name == node.inputs[0] and axis < rank - 1 else None
        shapes = [self.values[one].shape for one in node.inputs if one in self.constants]
        same_for_all = all(
            len(shape) < rank - axis or shape[len(shape) - rank + axis] == 1 for shape in shapes
        )
        return axis if node.kind in UNARY | BINARY and same_for_all else None

    def _keeps_rows(self, node: Node) -> bool:
        return node.numbers("strides", (1,))[0] == 1 and node.numbers("pads", (0,))[0] == 0

    def _spread(self, node: Node) -> bool:
        """Every input is a volume as large as the output, or a constant that is the same for all rows."""
        rank = len(self.values[node.outputs[0]].shape)
        for name in node.inputs:
            shape = self.values[name].shape if name else ()
            alike = self.scales.get(name) == self.scales[node.outputs[0]]
            same_for_all = name in self.constants and (
                len(shape) < rank - 2 or shape[len(shape) - rank + 2] == 1
            )
            if name and not alike and not same_for_all:
                return False
        return True

    def unrounded(self, name: str) -> str:
        """The value that a QuantizeLinear pair rounds to this one; the value itself where none does."""
        while name in self.maker and self.graph.nodes[self.maker[name]].kind in PAIR:
            name = self.graph.nodes[self.maker[name]].inputs[0]
        return name

    def is_zero(self, name: str) -> bool:
        """Whether rows of it are zero where a norm that it comes from is made zero."""
        place = self.maker.get(name)
        if place is None:
            return False
        node = self.graph.nodes[place]
        if not self.is_local(node):
            return False
        if node.kind == "Mul":
            return any(self.is_zero(one) for one in node.inputs) and self.is_normed(name)
        return node.kind == "GroupNormalization" or node.kind in KEEPS_ZERO and self.is_zero(node.inputs[0])

    def is_normed(self, name: str) -> bool:
        """Whether it comes from norms alone, number by number."""
        if name in self.constants:
            return True
        node = self.graph.nodes[self.maker[name]] if name in self.maker else None
        if node is None or not self.is_local(node):
            return False
        return (
            node.kind == "GroupNormalization"
            or node.kind in UNARY | BINARY | PAIR
            and all(map(self.is_normed, node.inputs))
        )


def _scale(seen: list[tuple[Sized, tuple[int, ...]]]) -> tuple[int, ...] | None:
    """By how much a value's spatial sizes are the latent's, at all sizes; None for what is no volume of one sample."""
    found = set()
    for value, sizes in seen:
        spatial = value.shape[2:]
        if len(value.shape) != len(sizes) + 2 or value.shape[0] != 1 or value.dtype != "float32":
            return None
        if any(large % small for large, small in zip(spatial, sizes, strict=True)):
            return None
        found.add(tuple(large // small for large, small in zip(spatial, sizes, strict=True)))
    return found.pop() if len(found) == 1 else None
