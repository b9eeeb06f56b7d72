"""A limit on the process's resident memory: an artifact's programs on an engine whose memory is foretold from a graph."""

from __future__ import annotations

from pathlib import Path
from typing import final

from .engine import shapes
from .footprint import EngineMemory, Footprint
from .memory import give_back_at_once, resident_bytes
from .memory_limit import MemoryLimit, Sizes
from .onnx_graph import OnnxGraph, read_graph
from .onnx_shapes import sized_values
from .slab_memory import SlabMemory
from .slab_search import Outcome, search
from .spec import ArtifactSpec


@final
class HostMemory(MemoryLimit):
    """`limit`: of the whole process. `base`: what is resident now, and the engine's libraries.

    With a limit the process's allocator gives large blocks back at once from then on.
    """

    def __init__(self, folder: Path, spec: ArtifactSpec, engine: EngineMemory, limit: int | None) -> None:
        if limit is not None:
            give_back_at_once()
        super().__init__(spec, limit, resident_bytes() + engine.library_bytes)
        self._folder, self._engine = folder, engine
        self._graphs: dict[str, OnnxGraph] = {}
        self._known: dict[tuple[str, str], tuple[Footprint, int]] = {}

    def footprint(self, name: str, sizes: Sizes) -> Footprint:
        return self._program(name, sizes)[0]

    def image_bytes(self, sizes: Sizes) -> int:
        return self._program("decode", {**sizes, "batch": 1})[1]

    def plan_slabs(self, sizes: Sizes, room: float) -> Outcome:
        memory = SlabMemory(self._folder, self._slab_program(sizes), self._engine)
        return search(memory, memory.forced(), memory.values(), (), room)

    def _program(self, name: str, sizes: Sizes) -> tuple[Footprint, int]:
        """(its memory, bytes of its outputs)."""
        given = shapes(self._spec.programs[name], sizes)  # type: ignore[index]
        key = name, str(given)
        if key not in self._known:
            if name not in self._graphs:
                self._graphs[name] = read_graph(self._folder / self._spec.programs[name].file)  # type: ignore[index]
            graph = self._graphs[name]
            values = sized_values(graph, given)
            outputs = sum(values[output].bytes for output in graph.outputs)
            self._known[key] = self._engine.footprint(graph, values), outputs
        return self._known[key]
