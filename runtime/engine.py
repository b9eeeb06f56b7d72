"""The engine protocol: open an ONNX program at fixed shapes, call it with arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .spec import ArtifactSpec, ProgramSpec

if TYPE_CHECKING:
    from .footprint import EngineMemory
    from .memory_limit import MemoryLimit
    from .programs import Programs
    from .sampling import Sampler

Arrays = Mapping[str, NDArray[np.generic]]

ON_HOST = ("schedule", "prepare")
"""Programs of a few vectors once a request, which engines for a device leave to the host."""


class Program(ABC):
    """One opened program; its shapes are fixed. Not for two threads at once."""

    @abstractmethod
    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        """Every output by its name. The arrays are the caller's: a later call does not write to them.

        `inputs` must have the names, dtypes and shapes that the program was opened with.
        """


class Engine(ABC):
    """A library that runs ONNX programs, with `threads` threads inside an operator."""

    name: str
    threads: int
    memory: EngineMemory | None = None
    """How its memory is foretold; None: it is not, and no limit on the host can be kept."""

    @abstractmethod
    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        """Open the ONNX file at `path` with every axis of `program`'s inputs set to `sizes[axis]`.

        Fixed sizes let an engine plan its memory and pick its kernels once (2x per step on a CPU).

        Raises:
            ValueError: the file is no ONNX program, or not the one that `program` describes.
        """

    def sampler(self, folder: Path, spec: ArtifactSpec, programs: Programs) -> Sampler:
        """What runs jobs of the artifact in `folder`: the loop on the host, unless the engine has a better one."""
        from .sampling import HostSampler  # which imports this module

        return HostSampler(spec, self, programs)

    def limited(self, folder: Path, spec: ArtifactSpec, limit: int) -> MemoryLimit:
        """What keeps a limit of so many bytes, on the host unless the engine has a device's memory.

        Raises ValueError where its memory is not foretold.
        """
        from .host_memory import HostMemory

        if self.memory is None:
            raise ValueError(
                f"[load] memory_limit: the memory of {self.name} is not foretold; use cuda, tensorrt, tensorrt-rtx, "
                "openvino or onnxruntime"
            )
        return HostMemory(folder, spec, self.memory, limit)


def shapes(program: ProgramSpec, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every input of `program`, by its name (KeyError: an axis that `sizes` lacks)."""
    return {t.name: tuple(s if isinstance(s, int) else sizes[s] for s in t.shape) for t in program.inputs}


def check_inputs(path: Path, program: ProgramSpec, found: Mapping[str, int]) -> None:
    """Compare the names (and ranks) of a file's inputs with the manifest's.

    Raises:
        ValueError: they differ.
    """
    wanted = {tensor.name: len(tensor.shape) for tensor in program.inputs}
    if dict(found) != wanted:
        raise ValueError(
            f"[engine] {path.name} takes {_listed(found)}, the manifest says {_listed(wanted)}; "
            "export the model again with `volcast export`"
        )


def unreadable(path: Path, engine: str, error: Exception) -> ValueError:
    """The one-line error for a file that an engine refuses."""
    reason = " ".join(str(error).split())[:200]
    remedy = SMALLER if _is_memory(reason) else "export the model again with `volcast export`"
    return ValueError(f"[engine] {engine} cannot open {path.name}: {reason}; {remedy}")


def failed(name: str, engine: str, error: Exception) -> ValueError:
    """The one-line error for a program that an engine cannot run on these inputs."""
    reason = " ".join(str(error).split())[:200]
    remedy = SMALLER if _is_memory(reason) else "check the conditions, or try another engine"
    return ValueError(f"[engine] {engine} failed in {name}: {reason}; {remedy}")


SMALLER = "not enough memory for these sizes: give a smaller size or batch"


def _is_memory(reason: str) -> bool:
    return any(word in reason.lower() for word in ("bad_alloc", "allocat", "out of memory"))


def _listed(inputs: Mapping[str, int]) -> str:
    return ", ".join(f"{name} (rank {rank})" for name, rank in inputs.items()) or "no input"
