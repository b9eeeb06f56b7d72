"""Calibration: an artifact samples, and every call of its programs notes how large the values are that will be int8."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from volcast.runtime.engine import Arrays, Engine, Program
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.spec import ArtifactSpec, ConditionField, ConditionSpec, ProgramSpec, Ratio

from .qdq import save

GUIDANCE = (2.0, 1.0, 4.0)
"""Weights that the samples take in turn where the network was trained for guidance: both its branches are seen."""


@final
class CalibrationEngine(Engine):
    """ONNX Runtime with eyes on some values of some files.

    Args:
        watched: by a program's file name, the values to watch.
        scratch: a folder for the programs with their eyes.

    Attributes:
        largest: by file name and value, the largest magnitude in all calls so far.
        calls: by file name, how many calls there were.
    """

    name = "onnxruntime"

    def __init__(self, watched: Mapping[str, Sequence[str]], scratch: Path, threads: int | None) -> None:
        self._engine = open_engine("onnxruntime", threads)
        self._watched = watched
        self._scratch = scratch
        self.threads = self._engine.threads
        self.largest: dict[str, dict[str, float]] = {name: {} for name in watched}
        self.calls: Counter[str] = Counter()

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        values = self._watched.get(path.name, ())
        if not values:
            return self._engine.open(path, program, sizes)
        place = self._scratch / path.name
        if not place.exists():
            save(with_eyes(onnx.load(path), values), place)
        return _Watched(self._engine.open(place, program, sizes), path.name, values, self)


@final
class _Watched(Program):
    def __init__(self, program: Program, file: str, values: Sequence[str], engine: CalibrationEngine) -> None:
        self._program = program
        self._file = file
        self._values = values
        self._engine = engine

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        outputs = self._program(inputs)
        largest = self._engine.largest[self._file]
        for place, value in enumerate(self._values):
            found = float(outputs.pop(_eye(place)))
            if not math.isfinite(found):
                raise ValueError(
                    f"[quantize] {value} in {self._file} is not finite while sampling; check the weights with `volcast verify`"
                )
            largest[value] = max(largest.get(value, 0.0), found)
        self._engine.calls[self._file] += 1
        return outputs


def with_eyes(model: onnx.ModelProto, values: Sequence[str]) -> onnx.ModelProto:
    """A copy of `model` that also gives the largest magnitude of each of `values`, a scalar each.

    The reduction is in the graph, so that no call keeps the values themselves.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for place, value in enumerate(values):
        eye = _eye(place)
        graph.node.append(helper.make_node("Abs", [value], [f"{eye}/abs"]))
        graph.node.append(helper.make_node("ReduceMax", [f"{eye}/abs"], [eye], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(eye, onnx.TensorProto.FLOAT, []))
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


def _eye(place: int) -> str:
    return f"volcast.largest.{place}"
