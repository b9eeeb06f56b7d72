"""The denoising loop of one shape, batch and plan length: buffers that stay, and its step as a graph.

One step is the network's input row, picked by a counter on the device; the network; the plan's update, which writes
the network's next input. Nothing crosses to the host between steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volcast import _core
from volcast.kernels import PlanTable, plan_table, sampler_step, step_counter
from volcast.runtime.spec import ArtifactSpec

from .executor import Executor
from .golden import find_variant
from .graphs import Graphs
from .model import DeviceModel

Array = NDArray[Any]
AHEAD = 2
"""Steps on the device before the host waits for the first: enough to hide a launch, few to take back."""
TOGETHER = 64
"""Steps of one launch at most. Ctrl-C waits for two launches, and a graph of 1000 steps has 10^5 nodes."""


class LoopKey(NamedTuple):
    """What a captured loop is fixed to. `inputs` are the step's further inputs with their shapes, batch left out."""

    batch: int
    shape: tuple[int, ...]
    steps: int
    guided: bool
    history_slots: int
    keeps_saved: bool
    inputs: tuple[tuple[str, tuple[int, ...]], ...]


class Start(NamedTuple):
    """What a request brings. x: float32 `[N, C, D, H, W]`; rows: `[steps, R]`; branches: further inputs of the step,
    `[N, ...]` each, without guidance one mapping, with it (unconditional, conditional)."""

    plan: _core.Plan
    x: Array
    rows: Array
    branches: tuple[Mapping[str, Array], ...]
    seeds: Array
    samples: Array
    guidance: float | None


class Previews(NamedTuple):
    """Every `every` steps the latent is copied aside and decoded on a stream of its own, while the loop goes on."""

    every: int
    snapshot: _core.Executable
    decode: _core.Executable
    stream: _core.Stream
    on_preview: Callable[[int], None]


@final
class StepLoop:
    """Allocates and captures when made; `run` allocates nothing. Not for two threads at once.

    Attributes:
        x: the latent, float32 `[N, C, D, H, W]`, channels last; the result after `run`.
        counter: see `kernels.step_counter`; after `run` it tells where a value was not finite.
        stream: where the steps run.
    """

    def __init__(
        self, spec: ArtifactSpec, model: DeviceModel, graphs: Graphs, stream: _core.Stream, key: LoopKey
    ) -> None:
        n, device = key.batch, model.device
        wide = 2 * n if key.guided else n
        tensors = {tensor.name: tensor for tensor in spec.programs["step"].inputs}
        columns = int(tensors["row"].shape[1])
        shapes = {"x": (wide, *key.shape), "row": (wide, columns)}
        shapes |= {name: (wide, *shape) for name, shape in key.inputs}
        described = model.described({name: (tensors[name], shape) for name, shape in shapes.items()})
        program, weights = model.program("step"), model.weights("step")
        model.check("step", described)
        # The latent and the conditions are read again in every step.
        kept = frozenset(described) - {"row"}
        self._network = Executor(program, weights, described, device, keep=kept)
        if wide > 1:
            variant = find_variant(self._network)
            if variant:
                self._network = Executor(
                    program, weights, described, device, self._network.arena, keep=kept, per_sample=variant
                )
        self.key, self.stream = key, stream
        self._model, self._guided = model, key.guided
        latent = (n, *key.shape)
        self.x = _volume(latent, device)
        self._saved = _volume(latent, device) if key.keeps_saved else None
        self._history = (
            torch.stack([_volume(latent, device).movedim(1, -1)] * key.history_slots).movedim(-1, 2)
            if key.history_slots
            else None
        )
        self._table = PlanTable(
            torch.zeros(key.steps, 11, dtype=torch.float64, device=device),
            torch.full((key.steps, 6), -1, dtype=torch.int32, device=device),
            key.history_slots,
            key.keeps_saved,
        )
        self._rows = torch.zeros(key.steps, columns, device=device)
        self._row = torch.zeros(1, columns, device=device)
        self.counter = step_counter(n, device)
        self._seeds = torch.zeros(n, dtype=torch.int64, device=device)
        self._samples = torch.zeros(n, dtype=torch.int64, device=device)
        self._guidance = torch.zeros(n, dtype=torch.float64, device=device) if key.guided else None
        alive = weakref.WeakMethod(self._step)

        def step() -> None:  # weakly: a graph may keep it, and the loop keeps the graph
            run = alive()
            assert run is not None
            run()

        self._graph = graphs.record(step, stream)
        self._graphs = graphs
        self._one = graphs.executable(self._graph)

    @cached_property
    def _several(self) -> tuple[_core.Executable, int]:
        """All steps as one launch, where they are many as a few equal ones, and how many launches that makes; for the
        first caller who wants nothing told between the steps."""
        steps = self.key.steps
        together = max(n for n in range(1, min(steps, TOGETHER) + 1) if steps % n == 0)
        return self._graphs.executable(self._graph, together), steps // together

    @property
    def bytes(self) -> int:
        """The device memory of the loop's own: the arena and the sampler's state."""
        own = (self.x, self._saved, self._history, self._rows, *self._table[:2])
        return self._network.plan.bytes + sum(tensor.nbytes for tensor in own if tensor is not None)

    def start(self, start: Start) -> None:
        """Upload a request. The stream must be idle."""
        table = plan_table(start.plan.rows)
        self._table.weights.copy_(table.weights)
        self._table.slots.copy_(table.slots)
        self._rows.copy_(self._with_offset("row", start.rows))
        x = torch.from_numpy(np.ascontiguousarray(start.x, np.float32))
        self.x.copy_(x)
        self._network.inputs["x"].copy_(torch.cat([x] * len(start.branches)))
        for name, _ in self.key.inputs:
            value = np.concatenate([branch[name] for branch in start.branches])
            self._network.inputs[name].copy_(self._with_offset(name, value))
        self._seeds.copy_(torch.from_numpy(start.seeds.astype(np.uint64).view(np.int64)))
        self._samples.copy_(torch.from_numpy(start.samples.astype(np.uint64).view(np.int64)))
        self.counter.copy_(step_counter(self.key.batch))
        if self._guidance is not None and start.guidance is not None:
            self._guidance.fill_(start.guidance)
        if self.x.is_cuda:
            torch.cuda.current_stream(self.x.device).synchronize()

    def run(
        self, on_step: Callable[[int, int], None] | None = None, previews: Previews | None = None
    ) -> _core.LoopTiming:
        """Every step, by the C++ loop. With nobody to tell, up to `TOGETHER` of them are one launch.

        What `on_step` raises stops it within `AHEAD` launches, and so does Ctrl-C.
        """
        if on_step is None and previews is None:
            executable, launches = self._several
            return _core.run_steps(executable, self.stream, launches, ahead=AHEAD)
        if previews is None:
            return _core.run_steps(self._one, self.stream, self.key.steps, ahead=AHEAD, on_step=on_step)
        return _core.run_steps(
            self._one, self.stream, self.key.steps, ahead=AHEAD, on_step=on_step, snapshot=previews.snapshot,
            preview=previews.decode, preview_stream=previews.stream, every=previews.every,
            on_preview=previews.on_preview,
        )  # fmt: skip

    def _step(self) -> None:
        n, network = self.key.batch, self._network
        # Past the last row (warm-ups, captures) the update does nothing, and any row may be shown.
        torch.index_select(self._rows, 0, self.counter[:1].clamp(max=self.key.steps - 1), out=self._row)
        network.inputs["row"].copy_(self._row.expand_as(network.inputs["row"]))
        network.run()
        out = network.outputs["out"]
        sampler_step(
            self.x, out[n:] if self._guided else out, self._table, self.counter, seeds=self._seeds,
            samples=self._samples, history=self._history, saved=self._saved,
            uncond=out[:n] if self._guided else None, guidance=self._guidance, network_input=network.inputs["x"],
        )  # fmt: skip

    def _with_offset(self, name: str, value: Array) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(value)).to(self.x.device)
        offset = self._model.offset("step", name)
        return tensor if offset is None else tensor + offset


def _volume(shape: tuple[int, ...], device: torch.device) -> Tensor:
    n, c, *spatial = shape
    return torch.zeros((n, *spatial, c), device=device).movedim(-1, 1)
