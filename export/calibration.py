"""Calibration: an artifact samples, and every call of its programs notes how large the values are that will be int8,
and the mean of what its convolutions read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from volcast.runtime.engine import Arrays, Engine, Program
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.spec import ArtifactSpec, ConditionField, ConditionSpec, ProgramSpec, Ratio

from .qdq import save

GUIDANCE = (2.0, 1.0, 4.0)
"""Weights that the samples take in turn where the network was trained for guidance: both its branches are seen."""


@final
@dataclass(frozen=True, kw_only=True)
class Eyes:
    """What to watch in a program: values by their largest magnitude, others (with their number of axes) by the mean of
    each channel."""

    largest: tuple[str, ...]
    mean: Mapping[str, int]


@final
class CalibrationEngine(Engine):
    """ONNX Runtime with eyes on some programs.

    Args:
        watched: by a program's file name, what to watch in it.
        scratch: a folder for the programs with their eyes.

    Attributes:
        largest: by file name and value, the largest magnitude in all calls so far.
        sums: by file name and value, the channel means `[C]` of all calls so far, added up.
        calls: by file name, how many calls there were.
    """

    name = "onnxruntime"

    def __init__(self, watched: Mapping[str, Eyes], scratch: Path, threads: int | None) -> None:
        self._engine = open_engine("onnxruntime", threads)
        self._watched = watched
        self._scratch = scratch
        self.threads = self._engine.threads
        self.largest: dict[str, dict[str, float]] = {name: {} for name in watched}
        self.sums: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in watched}
        self.calls: Counter[str] = Counter()

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        eyes = self._watched.get(path.name)
        if eyes is None:
            return self._engine.open(path, program, sizes)
        place = self._scratch / path.name
        if not place.exists():
            save(with_eyes(onnx.load(path), eyes), place)
        return _Watched(self._engine.open(place, program, sizes), path.name, eyes, self)

    def means(self, file: str) -> dict[str, NDArray[np.float64]]:
        """The channel means `[C]` over all calls of a program, by value."""
        return {value: total / self.calls[file] for value, total in self.sums[file].items()}


@final
class _Watched(Program):
    def __init__(self, program: Program, file: str, eyes: Eyes, engine: CalibrationEngine) -> None:
        self._program = program
        self._file = file
        self._eyes = eyes
        self._engine = engine

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        outputs = self._program(inputs)
        largest, sums = self._engine.largest[self._file], self._engine.sums[self._file]
        for place, value in enumerate(self._eyes.largest):
            found = float(outputs.pop(_eye("largest", place)))
            if not math.isfinite(found):
                raise ValueError(
                    f"[quantize] {value} in {self._file} is not finite while sampling; check the weights with `volcast verify`"
                )
            largest[value] = max(largest.get(value, 0.0), found)
        for place, value in enumerate(self._eyes.mean):
            sums[value] = sums.get(value, np.zeros(1)) + outputs.pop(_eye("mean", place)).astype(np.float64)
        self._engine.calls[self._file] += 1
        return outputs


def with_eyes(model: onnx.ModelProto, eyes: Eyes) -> onnx.ModelProto:
    """A copy of `model` that also gives the largest magnitudes, a scalar each, and the channel means `[C]`.

    The reductions are in the graph, so that no call keeps the values themselves.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph

    def show(kind: str, value: str, name: str, shape: list[int | str], *inputs: str) -> None:
        graph.node.append(helper.make_node(kind, [value, *inputs], [name], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))

    for place, value in enumerate(eyes.largest):
        name = _eye("largest", place)
        graph.node.append(helper.make_node("Abs", [value], [f"{name}/abs"]))
        show("ReduceMax", f"{name}/abs", name, [])
    for place, (value, axes) in enumerate(eyes.mean.items()):
        name = _eye("mean", place)
        others = np.array([0, *range(2, axes)], np.int64)
        graph.initializer.append(numpy_helper.from_array(others, f"{name}/axes"))
        show("ReduceMean", value, name, [f"{name}/channels"], f"{name}/axes")
    return result


def draw_condition(
    spec: ArtifactSpec, given: Mapping[str, object], generator: np.random.Generator
) -> dict[str, object]:
    """A condition for one calibration sample: what is `given`, and every other field drawn evenly from its range.

    Fields that follow from others by default do so here.

    Raises:
        ValueError: an array that has no fields and was not given: numbers drawn for it would be no calibration data.
    """
    drawn = dict(given)
    for condition in spec.conditions:
        if condition.name in given:
            continue
        if not condition.fields:
            raise ValueError(
                f"[quantize] no calibration data for the condition {condition.name}: give it, "
                f"--condition {condition.name}=@file.npy"
            )
        for field in condition.fields:
            if field.name not in given and not isinstance(field.default, Ratio):
                drawn[field.name] = _draw(condition, field, generator)
    return drawn


def _draw(condition: ConditionSpec, field: ConditionField, generator: np.random.Generator) -> float:
    if condition.dtype == "int64":
        return float(generator.integers(math.ceil(field.minimum), math.floor(field.maximum), endpoint=True))
    return float(generator.uniform(field.minimum, field.maximum))


def _eye(kind: str, place: int) -> str:
    return f"volcast.{kind}.{place}"
