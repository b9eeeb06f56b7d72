"""An artifact's programs, opened at fixed shapes and kept."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

import numpy as np
from numpy.typing import NDArray

from .engine import Arrays, Engine, Program
from .sizes import check_size
from .spec import Manifest, ProgramSpec

if TYPE_CHECKING:
    from .memory_limit import MemoryLimit, Opened

ProgramName = Literal[
    "schedule", "prepare", "step", "step_deep", "step_shallow", "decode", "encode", "gradient"
]

KEPT = 3
"""How many shapes of one program stay open; the least recently used goes first."""


@final
class Programs:
    """Opens programs of one artifact on demand. Not for two threads at once.

    Attributes:
        open_seconds: the time that opening has taken so far.
        memory: what keeps a limit; one shape of each program stays open then.
        captured: steps that a loop of an engine's own keeps open, with their sizes.
    """

    def __init__(
        self, folder: Path, spec: Manifest, engine: Engine, memory: MemoryLimit | None = None
    ) -> None:
        self._folder = folder
        self._engine = engine
        self.memory = memory
        self._spec = spec
        self._open: dict[ProgramName, OrderedDict[tuple[tuple[str, int], ...], Program]] = {}
        self.open_seconds = 0.0
        self.captured: list[Opened] = []

    def describe(self, name: ProgramName) -> ProgramSpec:
        """The manifest's description of a program (ValueError: the artifact lacks it)."""
        if name not in self._spec.programs:
            raise ValueError(
                f"[{name}] {self._spec.name} has no {name} program; export a bundle that has its network"
            )
        return self._spec.programs[name]

    def open(self, name: ProgramName, shapes: Mapping[str, tuple[int, ...]]) -> Program:
        """The program `name` for inputs of these shapes; those already open are reused.

        Raises:
            ValueError: a shape that the manifest does not allow, a program that the artifact lacks, a file that the
                engine refuses.
        """
        program = self.describe(name)
        sizes = bind(name, program, shapes)
        key = tuple(sorted(sizes.items()))
        kept = self._open.setdefault(name, OrderedDict())
        if key not in kept:
            for axis, size in key:
                check_size(name, self._spec.axis(axis), size)
            while len(kept) >= (KEPT if self.memory is None else 1):
                kept.popitem(last=False)
            kept[key] = self.open_alone(program, sizes)
        kept.move_to_end(key)
        return kept[key]

    def open_alone(self, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        """A program that is the caller's to keep, with its axes set to `sizes`."""
        began = time.perf_counter()
        opened = self._engine.open(self._folder / program.file, program, sizes)
        self.open_seconds += time.perf_counter() - began
        return opened

    def opened(self) -> list[Opened]:
        """What is open but `decode` and `encode`, by name, with its sizes."""
        return [*self.captured, *(
            (name, dict(key))
            for name, kept in self._open.items() if name not in ("decode", "encode")
            for key in kept
        )]  # fmt: skip

    def close(self, name: ProgramName) -> None:
        """Close every shape of a program."""
        self._open.pop(name, None)

    def call(self, name: ProgramName, given: Arrays) -> dict[str, NDArray[np.generic]]:
        """Run `name` on the inputs that it takes out of `given`, cast to the manifest's dtypes.

        Raises:
            ValueError: an input that `given` lacks, and whatever `open` raises.
        """
        program = self.describe(name)
        missing = [tensor.name for tensor in program.inputs if tensor.name not in given]
        if missing:
            raise ValueError(
                f"[artifact] {name} takes {', '.join(missing)}, which nothing gives; export the model again"
            )
        inputs = {t.name: np.ascontiguousarray(given[t.name], dtype=t.dtype) for t in program.inputs}
        return self.open(name, {key: value.shape for key, value in inputs.items()})(inputs)


def bind(name: str, program: ProgramSpec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The size of every axis of `program`'s inputs, read off the shapes.

    Raises:
        ValueError: a wrong rank or fixed size, or two sizes for one axis.
    """
    sizes: dict[str, int] = {}
    for tensor in program.inputs:
        shape = shapes[tensor.name]
        fits = len(shape) == len(tensor.shape)
        for wanted, size in zip(tensor.shape, shape, strict=False):
            fits &= size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size))
        if not fits:
            wanted_shape = "(" + ", ".join(str(sizes.get(str(s), s)) for s in tensor.shape) + ")"
            raise ValueError(f"[{name}] {tensor.name} has shape {tuple(shape)}: need {wanted_shape}")
    return sizes
