"""Gradient guidance: eps' = eps - s sqrt(1 - alpha_bar) grad log p(y | x_t) (arXiv:2105.05233 algorithm 2).

The gradient is a program of its own, `gradient`, which `export/gradient.py` writes: no torch here. A guided network is the
step program with two numbers more in its rows, the timestep and the factor of the gradient, and one input more, the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from .engine import Arrays, Engine, Program
from .programs import Programs
from .request import Request
from .spec import ArtifactSpec

Array = NDArray[np.generic]
LABEL = "classifier.label"
"""Among the step program's inputs: int64 `[N]`, the class. No condition has a dot in its name."""


@final
class GuidedStep(Program):
    """The step program whose output is moved along the gradient, at fixed shapes.

    With classifier-free guidance both branches are moved alike, so that u + w (c - u) is too; the gradient is computed once
    for both where they follow each other.
    """

    def __init__(self, programs: Programs, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`shapes`: of `__call__`'s inputs."""
        count, width = shapes["row"]
        own = {name: shape for name, shape in shapes.items() if name != LABEL}
        self._step = programs.open("step", {**own, "row": (count, width - 2)})
        given = {"x": shapes["x"], "timesteps": (count,), "label": (count,)}
        self._gradient = programs.open("gradient", given)
        self._asked: tuple[Array, ...] = ()
        self._found = np.zeros(0, np.float32)

    def __call__(self, inputs: Arrays) -> dict[str, Array]:
        """Of `step`'s inputs, with `row` `[N, R + 2]` of `guided_rows` and the class, `out`."""
        x, row = inputs["x"], np.asarray(inputs["row"], np.float32)
        own = {name: value for name, value in inputs.items() if name != LABEL}
        out = self._step({**own, "row": np.ascontiguousarray(row[:, :-2])})["out"]
        asked = x, np.ascontiguousarray(row[:, -2]), inputs[LABEL]
        if not self._asked or not all(map(np.array_equal, asked, self._asked)):
            named = dict(zip(("x", "timesteps", "label"), asked, strict=True))
            self._found = np.asarray(self._gradient(named)["gradient"], np.float32)
            self._asked = tuple(value.copy() for value in asked)
        factor = row[:, -1].reshape(-1, *[1] * (x.ndim - 1))
        return {"out": np.asarray(out, np.float32) + factor * self._found}


def open_step(programs: Programs, shapes: Mapping[str, tuple[int, ...]]) -> Program:
    """`step` for inputs of these shapes, guided where the class is among them."""
    return GuidedStep(programs, shapes) if LABEL in shapes else programs.open("step", shapes)


def guided_rows(
    spec: ArtifactSpec, request: Request, plan: _core.Plan, rows: NDArray[np.float32]
) -> NDArray[np.float32]:
    """`rows` `[steps, R]` of the plan, with a classifier `[steps, R + 2]`: the timestep and what its gradient is times."""
    if request.label is None:
        return rows
    signal, sigma = plan.rows["signal"], plan.rows["sigma"]
    # d out / d eps at a given x_t: x0 = (x - sigma eps) / signal and v = signal eps - sigma x0.
    slope = {"epsilon": np.ones_like(sigma), "sample": -sigma / signal, "v_prediction": 1 / signal}
    factors = -request.scale * sigma * slope[spec.scheduler.prediction_type]
    return np.column_stack([rows, plan.timesteps, factors]).astype(np.float32)


def with_label(request: Request, count: int, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The step program's inputs of one branch for `count` samples, with the class where the request has one."""
    return {**inputs} if request.label is None else {**inputs, LABEL: np.full(count, request.label)}


def check_classifier(request: Request, engine: Engine, *, limited: bool) -> None:
    """ValueError: a classifier is asked for where it does not run. `limited`: by a memory limit."""
    if request.label is None:
        return
    asked = f"[classifier] label={request.label}"
    if type(engine).sampler is not Engine.sampler:
        raise ValueError(
            f"{asked}: {engine.name} runs no gradient; load with engine='openvino' or 'onnxruntime'"
        )
    if limited:
        raise ValueError(
            f"{asked}: memory_limit: a classifier's memory is not foretold; load without, or leave it out"
        )
    if request.reuse != 1:
        raise ValueError(f"{asked}: reuse={request.reuse} keeps features and no gradients; leave one out")
