"""ONNX Runtime: on the CPU, or on one execution provider and nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .engine import ON_HOST, Arrays, Engine, Program, check_inputs, failed, unreadable
from .footprint_onnxruntime import MEMORY
from .memory import give_back
from .onnxruntime_provider import PROVIDERS, Provider
from .spec import ProgramSpec


@final
class OnnxRuntimeProgram(Program):
    """An `InferenceSession`; its outputs are new arrays at every call."""

    def __init__(self, session: Any, name: str, engine: str) -> None:
        self._session = session
        self._name = name
        self._engine = engine
        self._outputs = [output.name for output in session.get_outputs()]

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        try:
            results = self._session.run(self._outputs, dict(inputs))
        except Exception as error:  # ONNX Runtime's own exception classes share no base but Exception
            raise failed(self._name, self._engine, error) from error
        return dict(zip(self._outputs, results, strict=True))


@final
class OnnxRuntimeEngine(Engine):
    """Runs programs with `threads` threads inside an operator.

    Args:
        name: "onnxruntime" for the CPU, or one of `PROVIDERS`: step, decode and encode run on that provider whole, or
            not at all; `schedule` and `prepare`, a few vectors once a request, stay on the CPU.

    Raises ValueError: the provider, or a device for it, is not here.
    """

    def __init__(self, threads: int, name: str = "onnxruntime") -> None:
        self.name = name
        self.threads = threads
        self._provider = PROVIDERS.get(name)
        self.memory = MEMORY if self._provider is None else None
        self._devices = [] if self._provider is None else _devices(name, self._provider)

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        options = self._options(program, sizes)
        if self._provider is None or path.stem in ON_HOST:
            session = self._on_cpu(path, options)
        elif self._provider.has_norms:
            session = self._on(self._provider, path, options, path.name)
        else:
            with tempfile.TemporaryDirectory(prefix="volcast-") as folder:
                plain = self.without_norms(path, program, sizes, Path(folder))
                session = self._on(self._provider, plain, options, path.name)
        check_inputs(path, program, {value.name: len(value.shape) for value in session.get_inputs()})
        return OnnxRuntimeProgram(session, path.name, self.name)

    def without_norms(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int], folder: Path) -> Path:
        """The program in `folder`, at fixed sizes, with elementary operators for norms.

        ONNX Runtime puts them there after it has folded constants; opening what it writes folds the rest.
        """
        options = self._options(program, sizes)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folder / path.name)
        # A program of more than 2 GB cannot be written in one piece.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        self._on_cpu(path, options)
        return folder / path.name

    def _options(self, program: ProgramSpec, sizes: Mapping[str, int]) -> Any:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Workers of an idle session would otherwise spin on the cores that the next program needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for axis in {size for tensor in program.inputs for size in tensor.shape if isinstance(size, str)}:
            options.add_free_dimension_override_by_name(axis, sizes[axis])
        return options

    def _on_cpu(self, path: Path, options: Any) -> Any:
        # Both cost memory, up to twice as much, and at fixed sizes save no time.
        options.enable_mem_pattern = options.enable_mem_reuse = False
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise unreadable(path, self.name, error) from error
        give_back()
        return session

    def _on(self, provider: Provider, path: Path, options: Any, name: str) -> Any:
        """A session all of whose operators `provider` runs; `name` is the program's in messages."""
        options.log_severity_level = 4  # the error below says it
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        settings = provider.settings(self.threads)
        inside: list[tuple[str, dict[str, str]]] | None = None
        if self._devices:
            options.add_provider_for_devices(self._devices[:1], settings)
        else:
            inside = [(provider.name, settings)]
        try:
            # enable_fallback: or Python would try again on the CPU, with a note on stdout.
            session = onnxruntime.InferenceSession(path, options, providers=inside, enable_fallback=False)
        except Exception as error:
            raise _refused(name, self.name, error) from error
        if session.get_providers()[0] != provider.name:
            raise _refused(name, self.name, ValueError(f"it went to {', '.join(session.get_providers())}"))
        return session


def _devices(name: str, provider: Provider) -> list[Any]:
    """The devices of a provider that is a plug-in here; none where this ONNX Runtime has it inside."""
    if provider.plugin is not None and find_spec(provider.plugin) is not None and not _listed(provider):
        plugin = import_module(provider.plugin)
        try:
            onnxruntime.register_execution_provider_library(provider.name, plugin.get_library_path())
        except Exception as error:
            reason = " ".join(str(error).split())[-200:]
            raise ValueError(f"[engine] {name} does not load: {reason}; use another engine") from error
        if not _listed(provider):
            raise ValueError(
                f"[engine] {name}: {provider.plugin} knows no device of this machine (OpenVINO's takes Intel "
                "processors alone); use another engine, such as openvino"
            )
    if not _listed(provider) and provider.name not in onnxruntime.get_available_providers():
        raise ValueError(
            f"[engine] {name}: this ONNX Runtime {onnxruntime.__version__} has no {provider.name}; {provider.install}"
        )
    return _listed(provider)


def _listed(provider: Provider) -> list[Any]:
    return [
        found
        for found in onnxruntime.get_ep_devices()
        if found.ep_name == provider.name
        and found.device.type.name == provider.device
        and "is_virtual" not in found.device.metadata
    ]


def _refused(name: str, engine: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    # The cause stands at the end of ONNX Runtime's chains of source locations.
    return ValueError(
        f"[engine] {engine} cannot take {name}: {reason if len(reason) < 300 else '...' + reason[-300:]}; "
        "use another engine"
    )
