"""NVIDIA GPUs by TensorRT or TensorRT-RTX, without torch: plans that `volcast build` made, a step as one CUDA graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from .captured import AHEAD, CapturedProgram, CapturedStep, Network
from .engine import Arrays, Engine, Program
from .gpu import local_gpu
from .ledger import Ledger
from .memory_limit import MemoryLimit
from .plan_memory import ONE_BY_ONE
from .plans import Target
from .programs import Programs, bind
from .sampling import HostLoop, HostSampler, Loop, Sampler, Start
from .spec import ArtifactSpec, ProgramSpec
from .tensorrt_library import open_library
from .tensorrt_model import TensorRtModel

KEPT = 2
"""Captured steps that stay without a memory limit; the least recently used goes first."""


@final
class TensorRtEngine(Engine):
    """Runs artifacts on the first GPU.

    Raises ValueError where the library, the driver or a GPU is missing, each with what to do.
    """

    threads = 1

    def __init__(self, target: Target) -> None:
        self.name = target
        self._library = open_library(target)
        self._gpu = local_gpu(target)
        self._models: dict[Path, TensorRtModel] = {}

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        model = self._model(path.parents[len(Path(program.file).parts) - 1])
        samples = sizes.get("batch", 1)
        if path.stem in ONE_BY_ONE and samples > 1:
            return OneByOne(self.open(path, program, {**sizes, "batch": 1}), samples)
        opened = CapturedProgram(self._gpu.driver, model.network(path, program, sizes), path.stem)
        model.ledger.enter(opened, opened.bytes)
        return opened

    def sampler(self, folder: Path, spec: ArtifactSpec, programs: Programs) -> Sampler:
        model, step = self._model(folder), spec.programs["step"]
        loop = GraphLoop(
            self._gpu.driver, step, programs, lambda sizes: model.network(folder / step.file, step, sizes),
            model.ledger,
        )  # fmt: skip
        return HostSampler(spec, self, programs, loop, model.ledger)

    def limited(self, folder: Path, spec: ArtifactSpec, limit: int) -> MemoryLimit:
        return self._model(folder).memory(spec, limit)

    def _model(self, folder: Path) -> TensorRtModel:
        if folder not in self._models:
            self._models[folder] = TensorRtModel(folder, self._library, self._gpu)
        return self._models[folder]


@final
class OneByOne(Program):
    """A program of one sample, called for each sample of a batch."""

    def __init__(self, single: Program, samples: int) -> None:
        self._single, self._samples = single, samples

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        results = [
            self._single({name: value[i : i + 1] for name, value in inputs.items()})
            for i in range(self._samples)
        ]
        return {name: np.concatenate([one[name] for one in results]) for name in results[0]}


Opener = Callable[[Mapping[str, int]], Network]
"""The step's network at these sizes of its axes."""


@final
class GraphLoop(Loop):
    """The loop as launches of one graph a step. Captured steps are entered in the ledger."""

    def __init__(
        self, driver: _core.Driver, step: ProgramSpec, programs: Programs, network: Opener, ledger: Ledger
    ) -> None:
        self._driver, self._step, self._network, self._ledger = driver, step, network, ledger
        self._programs, self._host = programs, HostLoop(programs)
        self._kept: OrderedDict[tuple[object, ...], CapturedStep | None] = OrderedDict()

    def run(self, start: Start, after: Callable[[int, int], None], shows: bool) -> float:
        # The captured step's update knows nothing of a part that stays: the host's does.
        captured = None if start.known is not None else self._captured(start)
        if captured is None:
            return self._host.run(start, after, shows)
        assert not isinstance(start.guidance, tuple)  # Sampler.mixes_weights

        def told(done: int, steps: int) -> None:
            if shows:
                start.x[...] = captured.x
            after(done, steps)

        return captured.run(
            start.plan, start.x, start.rows, start.branches, start.seeds, start.samples, start.guidance, told,
            1 if shows else AHEAD,
        )  # fmt: skip

    def _captured(self, start: Start) -> CapturedStep | None:
        """The captured step for this batch; None where the network cannot be captured."""
        given = start.branches[_core.Branch.CONDITIONAL]
        shapes = {"x": start.x.shape, "row": (len(start.x), start.rows.shape[1])}
        shapes |= {name: value.shape for name, value in given.items()}
        guided = start.guidance is not None
        key = (guided, *sorted(shapes.items()))
        if key not in self._kept:
            limited = self._programs.memory is not None
            if limited:
                self._programs.close("decode")  # which may be of another size
                self._programs.captured.clear()
            while len(self._kept) >= (1 if limited else KEPT):
                self._kept.popitem(last=False)
            sizes = bind("step", self._step, shapes)
            network = self._network(sizes)
            captured = CapturedStep(self._driver, network, guided) if network.capturable else None
            self._kept[key] = captured
            if captured is not None:
                self._ledger.enter(captured, captured.bytes)
                self._programs.captured += [("step", sizes)] if limited else []
        self._kept.move_to_end(key)
        return self._kept[key]
