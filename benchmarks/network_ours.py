"""volcast's CUDA engine as one more way to run a model, and what only it has: cold starts, time outside kernels."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import volcast
from volcast.runtime.artifact import read_artifact
from volcast.runtime.denoiser import step_inputs
from volcast.runtime.device.decoding import open_decoder
from volcast.runtime.device.device import open_device
from volcast.runtime.device.executor import Executor
from volcast.runtime.device.golden import find_variant
from volcast.runtime.device.graphs import Graphs
from volcast.runtime.device.model import Described, DeviceModel
from volcast.runtime.device.program import DeviceProgramName
from volcast.runtime.engine_cuda import CudaEngine
from volcast.runtime.engine_onnxruntime import OnnxRuntimeEngine
from volcast.runtime.programs import Programs

from .network_peers import TIMESTEP, Call, Given, Way

SEED = 0


@final
class VolcastWay(Way):
    """The device programs as the engine captures them; volumes by `volcast.load`.

    Attributes:
        reports: the `Report` of the last volumes that were sampled.
    """

    name = "volcast"

    def __init__(self, folder: Path, device: str) -> None:
        self._spec = read_artifact(folder)
        self._device = open_device(device)
        self._weights = DeviceModel(folder, self._device.torch)
        self._host = Programs(folder, self._spec, OnnxRuntimeEngine(1))
        self._model = volcast.load(folder, engine=CudaEngine(device))
        self.weight_bytes = self._weights.bytes
        self.reports: list[Any] = []

    def step(self, given: Given) -> Call:
        n = len(given.x)
        arrays: dict[str, NDArray[Any]] = {name: value.numpy() for name, value in given.conditions.items()}
        constants = self._host.call("prepare", arrays) if "prepare" in self._spec.programs else {}
        row = self._host.call("schedule", {"timesteps": np.full(1, TIMESTEP, np.float32)})["rows"]
        inputs = {"x": given.x.numpy(), "row": np.repeat(row, n, axis=0)}
        inputs |= step_inputs(self._spec, arrays, constants)
        described = self._described("step", {name: value.shape for name, value in inputs.items()})
        model, device, kept = self._weights, self._device, frozenset(described)
        program, weights = model.program("step"), model.weights("step")
        with device.errors(), torch.inference_mode():
            executor = Executor(program, weights, described, device.torch, keep=kept)
            variant = find_variant(executor) if n > 1 else frozenset()
            if variant:
                executor = Executor(program, weights, described, device.torch, keep=kept, per_sample=variant)
            for name, buffer in executor.inputs.items():
                value = torch.from_numpy(np.ascontiguousarray(inputs[name])).to(buffer.device)
                offset = model.offset("step", name)
                buffer.copy_(value if offset is None else value + offset)

            def run() -> Tensor:
                executor.run()
                return executor.outputs["out"]

            return _Recorded(device.graphs, run, True)

    def decode(self, given: Given) -> Call:
        latent = self._spec.scale_factor * given.x[:1].to(self._device.torch)
        with self._device.errors(), torch.inference_mode():
            decoder = open_decoder(
                self._spec, self._weights, tuple(latent.shape[1:]), self._device.free_bytes()
            )
            return _Recorded(self._device.graphs, lambda: decoder(latent), decoder.recorded)

    def volume(self, given: Given, steps: int) -> Call:
        n = len(given.x)
        condition = {name: value[0].numpy() for name, value in given.conditions.items()}

        def sampled() -> Tensor:
            found = list(self._model.sample_many(
                n, SEED, batch=n, condition=condition, size=tuple(given.x.shape[2:]), steps=steps,
                scheduler="ddim", compat="monai-1.6",
            ))  # fmt: skip
            self.reports = [one.report for one in found]
            return torch.from_numpy(np.stack([one.array[None] for one in found]))

        return sampled

    def _described(self, name: DeviceProgramName, shapes: Mapping[str, tuple[int, ...]]) -> Described:
        """Checked as the engine checks it: with cuDNN's convolutions against sums on the CPU."""
        tensors = {tensor.name: tensor for tensor in self._spec.programs[name].inputs}
        described = self._weights.described({key: (tensors[key], shape) for key, shape in shapes.items()})
        with self._device.errors(), torch.inference_mode():
            self._weights.check(name, described)
        return described


@final
class _Recorded:
    """A function as one graph, or as it is where it allocates; its result lies in the same memory every time."""

    def __init__(self, graphs: Graphs, function: Call, recorded: bool) -> None:
        self._stream, self._results = graphs.stream(), list[Tensor]()

        def run() -> None:
            self._results[:] = [function()]

        self._graph = graphs.record(run, self._stream) if recorded else None  # owns the result's memory
        self._executable = graphs.executable(self._graph) if recorded else graphs.direct(run)

    def __call__(self) -> Tensor:
        self._executable.launch(self._stream)
        if not self._results or not self._results[0].is_cuda:
            self._stream.synchronize()
        return self._results[0]


def outside_percent(loop_s: float, steps: int, graph_ms: float) -> float:
    """Of the loop's time, what is not the network's graph: launches, waits, and the sampler's own kernel."""
    return 100 * (1 - steps * graph_ms / (1e3 * loop_s))


def cold_start_s(folder: Path, given: Given, steps: int) -> float:
    """From the start of a process to the first volume, with the caches that one before it filled."""
    condition = {name: value[0].tolist() for name, value in given.conditions.items() if value.numel() < 100}
    large = [name for name in given.conditions if name not in condition]
    code = (
        "import sys, json, numpy, volcast\n"
        "folder, condition, shapes, size, steps = json.loads(sys.argv[1])\n"
        "condition = {key: numpy.asarray(value) for key, value in condition.items()}\n"
        "condition |= {key: numpy.zeros(shape, 'float32') for key, shape in shapes.items()}\n"
        "volcast.load(folder, engine='cuda').sample(0, condition=condition, size=size, steps=steps, scheduler='ddim')\n"
    )
    shapes = {name: list(given.conditions[name].shape[1:]) for name in large}
    text = json.dumps([str(folder), condition, shapes, list(given.x.shape[2:]), steps])
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, text], check=True, capture_output=True)
        seconds = time.perf_counter() - began
    return seconds
