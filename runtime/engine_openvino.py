"""OpenVINO on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from .engine import Arrays, Engine, Program, check_inputs, failed, shapes, unreadable
from .footprint_openvino import MEMORY
from .memory import give_back
from .spec import ProgramSpec


def _import_openvino() -> Any:
    """`import openvino` without its usage report.

    The package's import sends an event to Google Analytics when `openvino_telemetry` can be imported; its own stub
    takes over when that import fails.
    """
    hide = "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules
    if hide:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if hide:
            del sys.modules["openvino_telemetry"]
    return openvino


openvino = _import_openvino()


@final
class OpenVinoProgram(Program):
    """One compiled model and the one infer request that it reuses; outputs are copied out of it."""

    def __init__(self, compiled: Any, outputs: list[str], name: str) -> None:
        self._name = name
        self._request = compiled.create_infer_request()
        self._outputs = outputs

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        try:
            result = self._request.infer(dict(inputs), share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            raise failed(self._name, "openvino", error) from error
        return dict(zip(self._outputs, result.to_tuple(), strict=True))


@final
class OpenVinoEngine(Engine):
    """Runs programs in one stream of `threads` threads, in float32."""

    name = "openvino"
    memory = MEMORY

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._core = openvino.Core()
        self._settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        try:
            model = self._core.read_model(path)
        except RuntimeError as error:
            raise unreadable(path, self.name, error) from error
        check_inputs(
            path, program, {value.any_name: value.partial_shape.rank.get_length() for value in model.inputs}
        )
        try:
            model.reshape({name: list(shape) for name, shape in shapes(program, sizes).items()})
            compiled = self._core.compile_model(model, "CPU", self._settings)
        except RuntimeError as error:
            raise unreadable(path, self.name, error) from error
        del model
        give_back()
        # OpenVINO merges tensors and keeps all their names, in no order.
        known = [output.get_names() for output in compiled.outputs]
        named = [next((t.name for t in program.outputs if t.name in names), "") for names in known]
        if "" in named or len(set(named)) != len(named):
            raise unreadable(path, self.name, ValueError(f"its outputs are named {known}"))
        return OpenVinoProgram(compiled, named, path.name)
