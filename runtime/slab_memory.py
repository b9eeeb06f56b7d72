"""What decoding slab by slab takes for a choice of stored values: bytes at once and work, without running anything."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from .footprint import EngineMemory, Footprint
from .onnx_graph import OnnxGraph, read_graph
from .onnx_shapes import Sized, sized_values
from .slab_decode import overwritten
from .slab_schedule import Pass, heights, schedule
from .slab_search import Outcome
from .slabs import LATENT, SlabProgram, Slabs

FLOPS_MS, BYTES_MS, CALL_MS = 5e7, 1e7, 0.1
"""What a core or two do in a millisecond, and what a call costs besides: only to compare plans with each other."""


@final
@dataclass(frozen=True)
class _Cost:
    """A pass at one height, in bytes beyond what was stored before it.

    `making`: while a slab is made; `made`: when one is to be stored, the rows that were copied for it gone. `single`: one
    slab makes everything. `milliseconds` of all slabs.
    """

    making: int
    made: int
    single: bool
    milliseconds: float

    def peak(self, stores: int) -> int:
        """With what the pass stores: memory that is not touched before the first slab is made."""
        return max(self.making + (0 if self.single else stores), self.made + stores)


@final
class SlabMemory:
    """A `slab_search.Simulation`."""

    def __init__(self, folder: Path, program: SlabProgram, engine: EngineMemory) -> None:
        self._program, self._engine, self._folder = program, engine, folder
        self._graphs: dict[int, OnnxGraph] = {}
        self._calls: dict[tuple[int, int], tuple[Footprint, float]] = {}
        self._costs: dict[tuple[tuple[int, ...], int], _Cost] = {}

    def bytes(self, name: str) -> int:
        return self._program.bytes(name)

    def forced(self) -> frozenset[str]:
        """What is stored in every plan: the image, and what a segment reads or makes whole."""
        operations = self._program.operations
        whole = {
            name
            for i in self._program.whole
            for name in (*operations[i].inputs, *operations[i].outputs)
            if name
        }
        return frozenset({*self._program.outputs, *whole} - {LATENT})

    def values(self) -> tuple[str, ...]:
        """Those that need not be stored."""
        forced = self.forced()
        return tuple(name for one in self._program.operations for name in one.outputs if name not in forced)

    def run(self, stored: Collection[str], limit: float) -> Outcome:
        live, peak, milliseconds, passes = self.bytes(LATENT), 0, 0.0, []
        for one in schedule(self._program, self._program.whole, stored):
            live += sum(map(self._moments, one.moments))
            taken = overwritten(self._program, one)
            new = sum(map(self.bytes, one.stores)) if taken is None else 0
            one, cost = self._fit(one, new, limit - live)
            passes.append(one)
            peak, milliseconds = max(peak, live + cost.peak(new)), milliseconds + cost.milliseconds
            live += new - sum(map(self._moments, one.forgets))
            live -= sum(self.bytes(name) for name in one.frees if name != taken)
        return Outcome(tuple(passes), peak, milliseconds)

    def _fit(self, one: Pass, stores: int, room: float) -> tuple[Pass, _Cost]:
        """The tallest that fits with the bytes that it stores; where none does, what takes least."""
        target = one.indices[-1]
        depth = self._program.depth(self._program.operations[target].segment.value)
        least: tuple[Pass, _Cost] | None = None
        for height in [0] if target in self._program.whole else heights(depth):
            cost = self._cost(one, height)
            if cost.peak(stores) <= room:
                return replace(one, height=height), cost
            if least is None or cost.peak(stores) < least[1].peak(stores):
                least = replace(one, height=height), cost
        assert least is not None
        return least

    def _cost(self, one: Pass, height: int) -> _Cost:
        key = one.indices, height
        if key not in self._costs:
            self._costs[key] = self._measure(one, height)
        return self._costs[key]

    def _measure(self, one: Pass, height: int) -> _Cost:
        program, slabs = self._program, self._program.slabs(one.indices, height)
        calls = {index: self.call(index, count) for index, count in slabs.counts.items()}
        held = peak = 0
        for footprint, _ in calls.values():
            peak = max(peak, held + footprint.held + footprint.opening)
            held += footprint.held
        made: dict[str, int] = {}
        last = {name: index for index in one.indices for name in program.operations[index].inputs}
        for index in one.indices:
            footprint = calls[index][0]
            copied = self._copied(index, slabs)
            peak = max(peak, held + sum(made.values()) + copied)
            made = {name: size for name, size in made.items() if last[name] != index}
            peak = max(peak, held + sum(made.values()) + copied + footprint.call)
            made[program.operations[index].segment.value] = footprint.call
        return _Cost(
            making=peak,
            made=held + calls[one.indices[-1]][0].call,
            single=len(slabs.starts) == 1,
            milliseconds=len(slabs.starts) * sum(milliseconds for _, milliseconds in calls.values()),
        )

    def _copied(self, index: int, slabs: Slabs) -> int:
        """Bytes of the rows that are copied for a call; whole values go in as they are."""
        program, segment = self._program, self._program.operations[index].segment
        shapes = program.input_shapes(index, slabs.counts[index])
        total = 0
        for read in segment.reads:
            maker = next((i for i in slabs.counts if program.operations[i].segment.value == read.value), None)
            there = program.depth(read.value) if maker is None else slabs.counts[maker]
            if read.before or read.after or shapes[read.input][2] != there:
                total += 4 * math.prod(shapes[read.input])
        return total

    def call(self, index: int, count: int) -> tuple[Footprint, float]:
        """An operation's program that makes `count` rows, and milliseconds of a call."""
        if (index, count) not in self._calls:
            if index not in self._graphs:
                file = self._program.operations[index].segment.program.file
                self._graphs[index] = read_graph(self._folder / file)
            graph = self._graphs[index]
            values = sized_values(graph, self._program.input_shapes(index, count))
            work = flops(graph, values) / FLOPS_MS + moved(graph, values) / BYTES_MS + CALL_MS
            self._calls[index, count] = self._engine.footprint(graph, values), work
        return self._calls[index, count]

    def _moments(self, name: str) -> int:
        """Of every row, mean and variance."""
        return 2 * 4 * math.prod(self._program.shape(name)[1:3])


def flops(graph: OnnxGraph, values: Mapping[str, Sized]) -> int:
    """Floating-point operations of convolutions and products, a multiply-add as two."""
    total = 0
    for node in graph.nodes:
        shapes = [values[name].shape for name in node.inputs if name]
        made = math.prod(values[node.outputs[0]].shape)
        if node.kind == "Conv":
            total += made * math.prod(shapes[1][1:])
        elif node.kind == "ConvTranspose":
            total += math.prod(shapes[0]) * math.prod(shapes[1][1:])
        elif node.kind == "MatMul":
            total += made * shapes[0][-1]
        elif node.kind == "Einsum":
            terms = str(node.attributes["equation"]).replace(" ", "").split("->")[0].split(",")
            sizes = {letter: size for term, shape in zip(terms, shapes, strict=True)
                     for letter, size in zip(term, shape, strict=True)}  # fmt: skip
            total += math.prod(sizes.values())
    return 2 * total


def moved(graph: OnnxGraph, values: Mapping[str, Sized]) -> int:
    """Bytes of every value once."""
    return sum(values[name].bytes for node in graph.nodes for name in node.outputs if name)
