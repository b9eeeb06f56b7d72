"""What memory a program takes while an engine holds it open and calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from .onnx_graph import OnnxGraph
from .onnx_shapes import Sized


@final
@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one program at fixed sizes.

    Attributes:
        opening: beyond `held`, for a moment while it is opened.
        held: from the first call on: weights, and what the engine keeps between calls.
        call: beyond `held`, from a call until its outputs are dropped. The inputs are the caller's and not counted.
    """

    opening: int
    held: int
    call: int

    @property
    def peak(self) -> int:
        return self.held + max(self.opening, self.call)


@final
@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """How an engine's memory is foretold.

    Attributes:
        library_bytes: what the first program of a process takes besides: pages of libraries, pools of threads.
        footprint: of the program with these operators, for values of these sizes.
    """

    library_bytes: int
    footprint: Callable[[OnnxGraph, Mapping[str, Sized]], Footprint]
