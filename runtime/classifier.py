"""Gradient guidance: eps' = eps - s sqrt(1 - alpha_bar) grad log p(y | x_t) (arXiv:2105.05233 algorithm 2).

The gradient is a program of its own, `gradient`, which `export/gradient.py` writes: no torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from .denoiser import Denoiser
from .programs import Programs
from .sizes import whole
from .spec import ArtifactSpec

Array = NDArray[np.generic]


@final
@dataclass(frozen=True, kw_only=True)
class Classifier:
    """What the classifier's gradient pulls to: class `label` from 0, `scale` s times; 6 is usual (arXiv:2203.04306)."""

    label: int
    scale: float = 6.0

    def check(self, spec: ArtifactSpec) -> None:
        """ValueError: the artifact has no classifier, or not this class; a scale out of range."""
        if "gradient" not in spec.programs:
            raise ValueError(
                f"[classifier] {spec.name} has no classifier; add one with volcast.export.gradient.add_classifier"
            )
        classes = int(spec.programs["gradient"].outputs[1].shape[1])
        label = whole(self.label)
        if type(label) is not int or not 0 <= label < classes:
            raise ValueError(f"[classifier] label={self.label!r}: need 0..{classes - 1}")
        if not math.isfinite(self.scale) or not 0 <= self.scale <= 1e6:
            raise ValueError(f"[classifier] scale={self.scale}: need 0..1e6")
        if spec.scheduler.prediction_type == "flow":
            raise ValueError(
                f"[classifier] {spec.name} predicts a flow, which has no alpha_bar; leave the classifier out"
            )


@final
class GuidedDenoiser:
    """A network whose epsilon is moved along the gradient of a classifier, in the form that the loop calls.

    With classifier-free guidance both branches are moved alike, so that u + w (c - u) is too.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: Classifier,
        spec: ArtifactSpec,
        programs: Programs,
        plan: _core.Plan,
    ) -> None:
        classifier.check(spec)
        self._denoiser, self._programs, self._label = denoiser, programs, classifier.label
        signal, sigma = plan.rows["signal"], plan.rows["sigma"]
        # d out / d eps at a given x_t: x0 = (x - sigma eps) / signal and v = signal eps - sigma x0.
        slope = {"epsilon": np.ones_like(sigma), "sample": -sigma / signal, "v_prediction": 1 / signal}
        self._factors = -classifier.scale * sigma * slope[spec.scheduler.prediction_type]
        self._timesteps = plan.timesteps
        self._step = -1
        self._move = np.zeros(0, np.float32)

    def __call__(self, step: int, x: NDArray[np.float32], branch: _core.Branch) -> Array:
        """The network's output for x `[N, C, D, H, W]` at row `step` of the plan, moved."""
        out = np.asarray(self._denoiser(step, x, branch), np.float32)
        if step != self._step:  # x is the same for both branches
            gradient, _ = class_gradient(self._programs, x, self._timesteps[step], self._label)
            self._step, self._move = step, np.float32(self._factors[step]) * gradient
        return out + self._move


def class_gradient(
    programs: Programs, x: NDArray[np.float32], timestep: float, label: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """grad log p(label | x_t) by x, like x `[N, C, D, H, W]`, and log p of every class `[N, classes]`."""
    count = len(x)
    given: dict[str, Array] = {
        "x": x, "timesteps": np.full(count, timestep, np.float32), "label": np.full(count, label, np.int64),
    }  # fmt: skip
    found = programs.call("gradient", given)
    return np.asarray(found["gradient"], np.float32), np.asarray(found["log_p"], np.float32)
