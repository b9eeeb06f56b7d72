"""ONNX Runtime as the oracle of drafts: the same inputs, the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from volcast.export.draft import Draft
from volcast.export.draft_run import run_draft
from volcast.runtime.spec import ArtifactSpec, ProgramSpec

BUDGET = 1e-4
"""The issue's budget for one step in float32, relative."""


def relative(result: Tensor, wanted: np.ndarray) -> float:
    assert np.linalg.norm(wanted) > 1e-3, "a zero oracle proves nothing"
    assert tuple(result.shape) == wanted.shape
    return float(np.linalg.norm(result.double().numpy() - wanted) / np.linalg.norm(wanted))


def onnx_outputs(path: Path, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return list(session.run(None, {name: inputs[name].numpy() for name in names}))


def check_draft(draft: Draft, path: Path, inputs: dict[str, Tensor]) -> None:
    """The draft gives what ONNX Runtime gives for the file, and the same shapes from tensors without numbers."""
    check_outputs(draft, inputs, onnx_outputs(path, inputs))


def check_outputs(draft: Draft, inputs: dict[str, Tensor], outputs: list[np.ndarray]) -> None:
    """As `check_draft`, for `onnx_outputs` that several drafts share."""
    results = run_draft(draft, inputs)
    empty = run_draft(draft, {name: value.to("meta") for name, value in inputs.items()})
    for wanted, result, shape in zip(outputs, results, empty, strict=True):
        assert relative(result, wanted) < BUDGET
        assert shape.shape == result.shape


def program_inputs(spec: ArtifactSpec, program: ProgramSpec, batch: int, large: str) -> dict[str, Tensor]:
    """Random inputs: the smallest size of each axis, twice it along those that end in a digit of `large`."""
    generator = torch.Generator().manual_seed(batch)

    def size(axis: str | int) -> int:
        if isinstance(axis, int):
            return axis
        return batch if axis == "batch" else spec.axis(axis).multiple * (2 if axis[-1] in large else 1)

    return {
        tensor.name: torch.randn([size(axis) for axis in tensor.shape], generator=generator)
        for tensor in program.inputs
    }
