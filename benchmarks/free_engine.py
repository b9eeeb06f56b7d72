"""An engine whose programs cost nothing: it shows what volcast itself does around the networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from volcast.runtime.engine import Arrays, Engine, Program
from volcast.runtime.spec import ProgramSpec


@final
class FreeProgram(Program):
    """Returns the same zeros at every call."""

    def __init__(self, outputs: dict[str, NDArray[np.generic]]) -> None:
        self._outputs = outputs

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        return self._outputs


@final
class FreeEngine(Engine):
    """Opens any program whose outputs have only axes of its inputs; no file is read."""

    name = "free"
    threads = 1

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        outputs = {
            tensor.name: np.zeros(
                [size if isinstance(size, int) else sizes[size] for size in tensor.shape], tensor.dtype
            )
            for tensor in program.outputs
        }
        return FreeProgram(outputs)
