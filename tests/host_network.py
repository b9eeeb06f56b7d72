"""Networks on the driver's host form: ONNX Runtime reads and writes the addresses that it is given, in a stream's order."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from volcast import _core
from volcast.runtime.captured import CapturedProgram, Network, Tensor
from volcast.runtime.engine import Engine, Program, shapes
from volcast.runtime.engine_tensorrt import GraphLoop
from volcast.runtime.ledger import Ledger
from volcast.runtime.programs import Programs
from volcast.runtime.sampling import HostSampler, Sampler
from volcast.runtime.spec import ArtifactSpec, ProgramSpec


class OrtNetwork(Network):
    """`runs` counts its runs. It takes `scratch` bytes of the device, of which it makes nothing."""

    capturable = True

    def __init__(
        self,
        driver: _core.Driver,
        path: Path,
        program: ProgramSpec,
        sizes: Mapping[str, int],
        scratch: int = 0,
    ) -> None:
        self.bytes = scratch
        self._scratch = _core.DeviceMemory(driver, max(scratch, 1))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._driver, self._kept, self._runs = driver, [], [0]
        given = shapes(program, sizes)
        self.inputs = {t.name: Tensor(shape=given[t.name], dtype=t.dtype) for t in program.inputs}
        zeros = {name: np.zeros(tensor.shape, tensor.dtype) for name, tensor in self.inputs.items()}
        names = [tensor.name for tensor in program.outputs]
        outputs = zip(names, self._session.run(names, zeros), strict=True)
        self.outputs = {name: Tensor(shape=y.shape, dtype=y.dtype.name) for name, y in outputs}

    @property
    def runs(self) -> int:
        return self._runs[0]

    def enqueue(self, addresses: Mapping[str, int], stream: _core.Stream) -> None:
        given = {name: at(addresses[name], tensor) for name, tensor in self.inputs.items()}
        made = {name: at(addresses[name], tensor) for name, tensor in self.outputs.items()}
        session, runs = self._session, self._runs  # not self, which keeps the function

        def run() -> None:
            runs[0] += 1
            for name, value in zip(made, session.run(list(made), given), strict=True):
                made[name][...] = value

        graph = _core.HostGraph(self._driver, run)
        executable = _core.Executable(self._driver, [graph.handle])
        self._kept.append(executable)
        executable.launch(stream)


def at(address: int, tensor: Tensor) -> np.ndarray:
    """The memory at an address as an array."""
    return np.frombuffer((ctypes.c_char * tensor.bytes).from_address(address), tensor.dtype).reshape(
        tensor.shape
    )


class HostEngine(Engine):
    """The programs, buffers, captures and loop of the TensorRT engine, on the host form."""

    name, threads = "host", 1

    def __init__(self) -> None:
        self.driver = _core.Driver.host()

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        return CapturedProgram(self.driver, OrtNetwork(self.driver, path, program, sizes), path.stem)

    def sampler(self, folder: Path, spec: ArtifactSpec, programs: Programs) -> Sampler:
        step = spec.programs["step"]
        loop = GraphLoop(
            self.driver,
            step,
            programs,
            lambda sizes: OrtNetwork(self.driver, folder / step.file, step, sizes),
            Ledger(),
        )
        return HostSampler(spec, self, programs, loop)
