"""A limit on the device's memory for TensorRT plans: what weights, the layers of a plan and the buffers around it take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import final

from .engine import shapes
from .footprint import Footprint
from .memory_limit import MemoryLimit, Sizes
from .onnx_graph import OnnxGraph, read_graph
from .onnx_shapes import Shape, sized_values
from .plans import PlanFile, PlanManifest, check_sizes, find_plan, planned_programs
from .programs import bind
from .slab_schedule import Pass, heights, schedule
from .slab_search import Outcome
from .slabs import SlabProgram
from .spec import ArtifactSpec, ProgramSpec

ONE_BY_ONE = ("decode", "encode")
"""Their plans take one image: its bits do not depend on its batch, and the memory is that of one."""
Scratch = Callable[[Sizes], int]
"""Bytes between the layers of a plan at these sizes."""
FIXED = {"tensorrt": 0, "tensorrt-rtx": 8000 * 2**10}
"""Bytes of them that do not depend on sizes: what the builder of TensorRT-RTX 1.7 adds to every plan, however small."""


@final
class PlanMemory(MemoryLimit):
    """`limit`: of the device's memory that plans take, without the CUDA context and the libraries' own code.

    Latents, images and all that slabs store lie on the host: one segment's plan is on the device at once.
    """

    def __init__(
        self,
        artifact: Path,
        spec: ArtifactSpec,
        folder: Path,
        plans: PlanManifest,
        limit: int | None,
        scratch: Callable[[str], Scratch] | None = None,
    ) -> None:
        """`folder`: of the plans. `scratch`: loads a program's plan and lets the library tell; None: foretold from what
        the builder said of the largest sizes."""
        super().__init__(spec, limit, 0)
        programs = planned_programs(spec)
        self._plans_of = {
            name: PlannedProgram(name, program, artifact, find_plan(folder, plans, name))
            for name, program in programs.items()
        }
        self._folder, self._manifest, self._scratch = folder, plans, scratch
        self._known: dict[tuple[str, str], Footprint] = {}

    def footprint(self, name: str, sizes: Sizes) -> Footprint:
        return self._footprints(name)(sizes)

    def image_bytes(self, sizes: Sizes) -> int:
        return 0

    def plan_slabs(self, sizes: Sizes, room: float) -> Outcome:
        program = self._slab_program(sizes)
        stored = {name for one in program.operations for name in one.outputs}
        fitted = [self._fit(program, one, room) for one in schedule(program, program.whole, stored)]
        return Outcome(tuple(one for one, _ in fitted), max(held for _, held in fitted), 0.0)

    def _fit(self, program: SlabProgram, one: Pass, room: float) -> tuple[Pass, int]:
        """The tallest slabs that fit, and their bytes; where none do, the lowest. All is stored: one operation a pass."""
        (index,) = one.indices
        segment = program.operations[index].segment
        footprint = self._footprints(Path(segment.program.file).stem)
        held = 0
        for height in [0] if segment.whole else heights(program.depth(segment.value)):
            rows = program.slabs(one.indices, height).counts[index]
            sizes = bind("decode", segment.program, program.input_shapes(index, rows))
            one, held = replace(one, height=height), footprint(sizes).held
            if held <= room:
                break
        return one, held

    def _footprints(self, name: str) -> Callable[[Sizes], Footprint]:
        """Of one program, whose plan is loaded, if it must be, as long as this is kept."""
        plan = self._plans_of[name]
        tell: Scratch | None = None

        def footprint(sizes: Sizes) -> Footprint:
            nonlocal tell
            sizes = {**sizes, "batch": 1} if name in ONE_BY_ONE else sizes
            given = shapes(plan.program, sizes)
            key = name, str(given)
            if key not in self._known:
                check_sizes(self._folder, self._manifest, name, sizes)
                if self._scratch is None:
                    scratch = plan.foretold(given, FIXED[self._manifest.target])
                else:
                    tell = tell or self._scratch(name)
                    scratch = tell(sizes)
                held = plan.file.weight_bytes + max(scratch, 1) + plan.buffers(given)
                self._known[key] = Footprint(opening=0, held=held, call=0)
            return self._known[key]

        return footprint


@final
class PlannedProgram:
    """One program, the graph that it was built from, and its plan's description."""

    def __init__(self, name: str, program: ProgramSpec, artifact: Path, file: PlanFile) -> None:
        self.name, self.program, self.file = name, program, file
        self._path = artifact / program.file

    @cached_property
    def _graph(self) -> OnnxGraph:
        return read_graph(self._path)

    def buffers(self, given: Mapping[str, Shape]) -> int:
        """Bytes of the inputs and outputs; of a step's for both branches of guidance, which share x and row."""
        total = self._bytes(given, (*self._graph.inputs, *self._graph.outputs))
        if self.name == "step":
            own = [name for name in self._graph.inputs if name not in ("x", "row")]
            total += self._bytes(given, (*own, *self._graph.outputs))
        return total

    def foretold(self, given: Mapping[str, Shape], fixed: int) -> int:
        """Bytes between the layers: a share of those at the largest sizes, as of inputs and outputs, and `fixed`."""
        most = self.file.scratch_bytes
        if most is None:
            raise ValueError(
                f"[memory] what {self.file.file} takes is not known: the library did not tell when it was built; build "
                "again with another version"
            )
        largest = shapes(self.program, {axis: one.maximum for axis, one in self.file.ranges.items()})
        fixed = min(fixed, most)
        return fixed + (most - fixed) * self.buffers(given) // self.buffers(largest)

    def _bytes(self, given: Mapping[str, Shape], names: Iterable[str]) -> int:
        values = sized_values(self._graph, given)
        return sum(values[name].bytes for name in names)
