"""Denoiser: the step program of one batch with its rows and constants, in the form that the loop calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from .engine import Program
from .spec import ArtifactSpec

Array = NDArray[np.generic]
Network = Callable[[int, NDArray[np.float32], _core.Branch], Array]
"""`Denoiser`'s call."""


@final
class Denoiser:
    """The network of one batch.

    Args:
        program: `step`, opened for this batch.
        rows: float32 `[steps, R]`, the schedule program's output for the plan's timesteps.
        branches: for each branch of guidance the further inputs of the program, each with its batch axis.
    """

    def __init__(
        self, program: Program, rows: Array, branches: Mapping[_core.Branch, Mapping[str, Array]]
    ) -> None:
        self._program = program
        self._rows = rows
        self._branches = branches

    def __call__(self, step: int, x: NDArray[np.float32], branch: _core.Branch) -> Array:
        """The network's output for x `[N, C, D, H, W]` at row `step` of the plan."""
        row = np.repeat(self._rows[step : step + 1], x.shape[0], axis=0)
        return self._program({"x": x, "row": row, **self._branches[branch]})["out"]


@final
class SweptDenoiser:
    """Classifier-free guidance with a weight for each sample: u + w (c - u), in float64 as the loop's own."""

    def __init__(self, denoiser: Network, weights: Sequence[float]) -> None:
        self._denoiser = denoiser
        self._weights = np.array(weights, np.float64)

    def __call__(self, step: int, x: NDArray[np.float32], branch: _core.Branch) -> Array:
        """The guided output for x `[N, C, D, H, W]`, whose volume n has weight n. `branch` is the loop's only one."""
        u = self._denoiser(step, x, _core.Branch.UNCONDITIONAL).astype(np.float64)
        c = self._denoiser(step, x, branch).astype(np.float64)
        weights = self._weights.reshape(-1, *[1] * (x.ndim - 1))
        return (u + weights * (c - u)).astype(np.float32)


def step_inputs(
    spec: ArtifactSpec, values: Mapping[str, Array], constants: Mapping[str, Array]
) -> dict[str, Array]:
    """What `step` takes besides x and row: constants that `prepare` gave and raw conditions, by name.

    Raises:
        ValueError: the program wants something that nothing gives.
    """
    known = {**values, **constants}
    wanted = {t.name: t.dtype for t in spec.programs["step"].inputs if t.name not in ("x", "row")}
    missing = sorted(wanted.keys() - known.keys())
    if missing:
        raise ValueError(
            f"[artifact] step takes {', '.join(missing)}, which nothing gives; export the model again"
        )
    return {name: np.ascontiguousarray(known[name], dtype) for name, dtype in wanted.items()}
