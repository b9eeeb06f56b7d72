"""What a program holds at once: values live from the operator that makes them to the last one that reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, final

from .onnx_graph import Node, OnnxGraph
from .onnx_shapes import VIEWS, Sized


class Memory(Protocol):
    """Where buffers come from."""

    def take(self, size: int) -> int:
        """A buffer of so many bytes; its number."""
        ...

    def give(self, buffer: int) -> None:
        """Its memory may be used again."""
        ...


@final
class Heap:
    """Buffers that are the operating system's again as soon as they are given back.

    Attributes:
        live: bytes of the buffers that are out.
        peak: the most there were.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._next = 0

    def take(self, size: int) -> int:
        self._next += 1
        self._sizes[self._next] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        return self._next

    def give(self, buffer: int) -> None:
        self.live -= self._sizes.pop(buffer)


@final
class Walk:
    """The values of a program as an engine makes and drops them, in `memory`.

    Inputs and weights take nothing here. `readers` counts who still reads a value; the program's outputs stay.
    """

    def __init__(
        self, nodes: Iterable[Node], graph: OnnxGraph, values: Mapping[str, Sized], memory: Memory
    ) -> None:
        self.values, self.memory = values, memory
        self._buffers: dict[str, int] = {}
        self._readers: dict[str, int] = {}
        for node in nodes:
            for name in node.inputs:
                self._readers[name] = self._readers.get(name, 0) + 1
        for name in graph.outputs:
            self._readers[name] = self._readers.get(name, 0) + 1
        self._views: dict[str, str] = {}

    def size(self, name: str) -> int:
        return self.values[name].bytes

    def make(self, name: str, size: int | None = None) -> None:
        """A value in a buffer of its own."""
        self._buffers[name] = self.memory.take(self.size(name) if size is None else size)
        self._drop(name, 0)

    def over(self, name: str, inputs: Sequence[str], again: bool = False) -> None:
        """A value in the buffer of an input that is as large and ends here, else in one of its own.

        `again`: also in that of one which the operator reads twice.
        """
        for other in dict.fromkeys(inputs):
            base = self._base(other)
            ends = self._readers[base] == 1 or again and self._readers[base] == inputs.count(other)
            if base in self._buffers and ends and self.size(base) == self.size(name):
                self._buffers[name] = self._buffers.pop(base)
                self._drop(name, 0)
                return
        self.make(name)

    def view(self, name: str, other: str) -> None:
        """A value in the memory of another, which lasts as long."""
        base = self._base(other)
        self._views[name] = base
        self._readers[base] = self._readers.get(base, 0) + self._readers.get(name, 0)

    def read(self, names: Iterable[str]) -> None:
        """An operator has read these: what nothing else reads goes."""
        for name in names:
            self._drop(self._base(name), 1)

    def scratch(self, *sizes: int) -> None:
        """Buffers for a moment, all at once."""
        for buffer in [self.memory.take(size) for size in sizes]:
            self.memory.give(buffer)

    def _base(self, name: str) -> str:
        return self._views.get(name, name)

    def _drop(self, name: str, count: int) -> None:
        self._readers[name] = self._readers.get(name, 0) - count
        if self._readers[name] <= 0 and name in self._buffers:
            self.memory.give(self._buffers.pop(name))


def constant_values(graph: OnnxGraph) -> frozenset[str]:
    """Weights, and values that depend on weights alone: engines compute these once, when they open a program."""
    known = set(graph.constants)
    for node in graph.nodes:
        if node.inputs and all(name in known for name in node.inputs if name):
            known |= set(node.outputs)
    return frozenset(known)


def weight_bytes(graph: OnnxGraph, values: Mapping[str, Sized]) -> int:
    """Bytes of all constants that operators read, as they are then."""
    constant = constant_values(graph)
    read = {
        name
        for node in graph.nodes
        if not constant.issuperset(node.outputs)
        for name in node.inputs
        if name in constant
    }
    return sum(values[name].bytes for name in read)


def is_view(node: Node) -> bool:
    """Whether the output is the first input's memory."""
    return node.kind in VIEWS
