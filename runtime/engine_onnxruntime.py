"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .engine import Arrays, Engine, Program, check_inputs, failed, unreadable
from .spec import ProgramSpec


@final
class OnnxRuntimeProgram(Program):
    """An `InferenceSession`; its outputs are new arrays at every call."""

    def __init__(self, session: Any, name: str) -> None:
        self._session = session
        self._name = name
        self._outputs = [output.name for output in session.get_outputs()]

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        try:
            results = self._session.run(self._outputs, dict(inputs))
        except Exception as error:  # as above: no common base
            raise failed(self._name, "onnxruntime", error) from error
        return dict(zip(self._outputs, results, strict=True))


@final
class OnnxRuntimeEngine(Engine):
    """Runs programs with `threads` threads inside an operator."""

    name = "onnxruntime"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Workers of an idle session would otherwise spin on the cores that the next program needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for axis in {size for tensor in program.inputs for size in tensor.shape if isinstance(size, str)}:
            options.add_free_dimension_override_by_name(axis, sizes[axis])
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exception classes share no base but Exception
            raise unreadable(path, self.name, error) from error
        check_inputs(path, program, {value.name: len(value.shape) for value in session.get_inputs()})
        return OnnxRuntimeProgram(session, path.name)
