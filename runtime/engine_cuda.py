"""NVIDIA GPUs by our own kernels and cuDNN, the whole loop as CUDA graphs; on the CPU the same programs and loop.

Needs PyTorch. Runs the device programs that `volcast build --target cuda` put beside the artifact's ONNX programs;
`schedule` and `prepare`, a few vectors once a request, stay with ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final
from weakref import WeakValueDictionary

from .atomic import sha256
from .device.device import open_device
from .device.model import DeviceModel
from .device.program import PROGRAMS
from .device.run import DeviceRun
from .device.sampling import DeviceSampler
from .engine import ON_HOST, Engine, Program
from .engine_onnxruntime import OnnxRuntimeEngine
from .programs import Programs
from .sampling import Sampler
from .sizes import parse_bytes
from .spec import ArtifactSpec, ProgramSpec


@final
class CudaEngine(Engine):
    """Runs artifacts on one GPU.

    Args:
        device: "cuda", "cuda:1"; "cpu" runs the same programs, memory plan and C++ loop with PyTorch's operators.
        memory_limit: bytes on the device for weights, loop and decode, or a text as "2GiB"; None: what is free.

    Raises ValueError: no such GPU, one that is too old, PyTorch without CUDA, a limit that is none. A GPU that the
    process has lost (a kernel that failed, an uncorrectable memory error) is named at every later request; only a new
    process has it again, since nothing brings PyTorch's memory and libraries back to it.
    """

    name = "cuda"
    threads = 1

    def __init__(self, device: str = "cuda", memory_limit: int | str | None = None) -> None:
        self._limit = None if memory_limit is None else parse_bytes("cuda", memory_limit)
        self._device = open_device(device)
        self._host = OnnxRuntimeEngine(self.threads)
        self._models: WeakValueDictionary[tuple[Path, str], DeviceModel] = WeakValueDictionary()

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        if path.stem in ON_HOST:
            return self._host.open(path, program, sizes)
        return DeviceRun(self._device, self._model(path.parent), path.stem, program, sizes, self._limit)

    def sampler(self, folder: Path, spec: ArtifactSpec, programs: Programs) -> Sampler:
        return DeviceSampler(spec, self._device, self._model(folder), programs, self._limit)

    def _model(self, folder: Path) -> DeviceModel:
        """One for all who use it; not one that was read before the folder was built anew."""
        programs = folder / "engines" / "cuda" / PROGRAMS
        key = folder, sha256(programs) if programs.is_file() else ""
        model = self._models.get(key)
        if model is None:
            with self._device.errors():
                model = self._models[key] = DeviceModel(folder, self._device.torch)
        return model
