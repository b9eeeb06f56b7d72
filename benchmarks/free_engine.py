"""An engine whose programs cost nothing: it shows what volcast itself does around the networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from volcast.runtime.engine import Arrays, Engine, Program
from volcast.runtime.pipeline import Model
from volcast.runtime.spec import ArtifactSpec, ProgramSpec


@final
class FreeProgram(Program):
    """Returns the same zeros at every call."""

    def __init__(self, outputs: dict[str, NDArray[np.generic]], seen: dict[str, NDArray[np.generic]]) -> None:
        self._outputs = outputs
        self._seen = seen

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        if not self._seen:
            self._seen.update({name: value.copy() for name, value in inputs.items()})
        return self._outputs


@final
class FreeEngine(Engine):
    """Opens any program whose outputs have only axes of its inputs; no file is read.

    Attributes:
        seen: by the file's name, a copy of the inputs of the first call.
    """

    name = "free"
    threads = 1

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, NDArray[np.generic]]] = {}

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        outputs = {
            tensor.name: np.zeros(
                [size if isinstance(size, int) else sizes[size] for size in tensor.shape], tensor.dtype
            )
            for tensor in program.outputs
        }
        return FreeProgram(outputs, self.seen.setdefault(path.name, {}))


def first_noise(
    spec: ArtifactSpec, seed: int, conditions: Mapping[str, NDArray[np.generic]]
) -> NDArray[np.float32]:
    """The noise `[1, C, D', H', W']` that sample 0 of `seed` starts from: what the first step of a run is shown."""
    engine = FreeEngine()
    # Without decode the loop's x comes back as it is, and no autoencoder is needed.
    programs = {name: spec.programs[name] for name in spec.programs if name not in ("decode", "encode")}
    Model(Path(), spec.model_copy(update={"programs": programs}), engine).sample(
        seed, steps=1, condition=conditions
    )
    return np.asarray(engine.seen[spec.programs["step"].file]["x"], np.float32)
