"""Feature reuse: most of the network runs at every k-th step, its last feature is kept for the steps between.

DeepCache, arXiv:2312.00858. What is kept and where the cut lies: `volcast.export.passes.reuse`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from .engine import Program
from .programs import Programs
from .request import Request
from .spec import ArtifactSpec

Array = NDArray[np.generic]
Branches = Mapping[_core.Branch, Mapping[str, Array]]


@final
class ReusingDenoiser:
    """The network of one batch, called row by row; each branch of guidance keeps a feature of its own.

    Args:
        programs: `step_deep` and `step_shallow` are opened for the batch of `x` `[N, C, D, H, W]`.
        rows: float32 `[steps, R]`, the schedule program's output for the plan's timesteps.
        branches: for each branch of guidance what `step` takes besides, each with its batch axis.
        every: rows 0, k, 2k, .. of the plan run the whole network.
    """

    def __init__(
        self, programs: Programs, x: NDArray[np.float32], rows: Array, branches: Branches, every: int
    ) -> None:
        feature = programs.describe("step_deep").outputs[1]
        shapes = {name: value.shape for name, value in branches[_core.Branch.CONDITIONAL].items()}
        shapes |= {"x": x.shape, "row": (len(x), *rows.shape[1:])}
        shapes[feature.name] = (len(x), int(feature.shape[1]), *x.shape[2:])
        self._deep: Program = programs.open("step_deep", shapes)
        self._shallow: Program = programs.open("step_shallow", shapes)
        taken = {tensor.name for tensor in programs.describe("step_shallow").inputs}
        self._rows, self._every, self._feature = rows, every, feature.name
        self._branches = branches
        # A top level without attention or SPADE takes fewer constants, or none.
        self._shown = {
            branch: {name: value for name, value in given.items() if name in taken}
            for branch, given in branches.items()
        }
        self._kept: dict[_core.Branch, Array] = {}

    def __call__(self, step: int, x: NDArray[np.float32], branch: _core.Branch) -> Array:
        """The network's output for x `[N, C, D, H, W]` at row `step` of the plan."""
        given = {"x": x, "row": np.repeat(self._rows[step : step + 1], x.shape[0], axis=0)}
        if step % self._every == 0:
            found = self._deep({**given, **self._branches[branch]})
            self._kept[branch] = found[self._feature]
        else:
            found = self._shallow({**given, **self._shown[branch], self._feature: self._kept[branch]})
        return found["out"]


def check_reuse(spec: ArtifactSpec, request: Request, engine: str, *, able: bool, limited: bool) -> None:
    """ValueError: a request reuses features where it cannot. `able`: the engine's loop is; `limited`: by a memory limit."""
    if request.reuse == 1:
        return
    asked = f"[sample] reuse={request.reuse}"
    if not spec.reuses:
        raise ValueError(
            f"{asked}: {spec.name} has no programs for it; export it with `volcast export BUNDLE --reuse`"
        )
    if not able:
        raise ValueError(f"{asked}: the engine {engine} has no loop for it; take openvino or onnxruntime")
    if limited:
        raise ValueError(f"{asked}: no memory limit is kept with it; load the model without one")


def refuse_reuse(request: Request, operation: str, instead: str) -> None:
    """ValueError, where only whole steps are run: the request reuses features."""
    if request.reuse != 1:
        raise ValueError(f"[{operation}] reuse={request.reuse}: {instead}, or leave it out")
