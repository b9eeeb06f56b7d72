"""The sampler core in C++: noise schedules, sampling plans, counter-based noise, the loop."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

class Schedule:
    """The noise schedule of training, float64 `[T]`: alphas_cumprod = cumprod(1 - betas)."""

    @property
    def betas(self) -> NDArray[np.float64]: ...
    @property
    def alphas_cumprod(self) -> NDArray[np.float64]: ...
    def __len__(self) -> int: ...

def linear_beta(timesteps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Schedule: ...
def scaled_linear_beta(timesteps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Schedule: ...
def sigmoid_beta(
    timesteps: int, beta_start: float = 1e-4, beta_end: float = 2e-2, sig_range: float = 6.0
) -> Schedule: ...
def cosine(timesteps: int, s: float = 8e-3) -> Schedule: ...

class Spacing(Enum):
    LEADING = ...
    LINSPACE = ...
    TRAILING = ...

class Prediction(Enum):
    EPSILON = ...
    SAMPLE = ...
    V_PREDICTION = ...

class Variance(Enum):
    FIXED_SMALL = ...
    FIXED_LARGE = ...

class Branch(Enum):
    """Which condition the network applies; BOTH: x is `[2N, ...]`, the unconditional half first."""

    CONDITIONAL = ...
    UNCONDITIONAL = ...
    BOTH = ...

def spaced_timesteps(
    spacing: Spacing, train_timesteps: int, steps: int, steps_offset: int = 0
) -> list[int]: ...
def monai_linspace(train_timesteps: int, steps: int, steps_offset: int = 0) -> list[int]: ...

class Plan:
    """Immutable rows of coefficients, one per network call; share it between requests and threads."""

    @property
    def method(self) -> str: ...
    @property
    def train_timesteps(self) -> int: ...
    @property
    def history_slots(self) -> int: ...
    @property
    def keeps_saved(self) -> bool: ...
    @property
    def stochastic(self) -> bool: ...
    @property
    def timesteps(self) -> NDArray[np.float64]:
        """What the network is shown, `[rows]`."""
    @property
    def rows(self) -> NDArray[Any]:
        """Structured, read-only, `[rows]`; the fields are those of `Row` in csrc/plan.hpp."""
    def __len__(self) -> int: ...

class Steps:
    def __init__(
        self,
        steps: int,
        *,
        spacing: Spacing = ...,
        steps_offset: int = 0,
        start: int = 0,
        set_alpha_to_one: bool = True,
        monai: bool = False,
    ) -> None: ...

def make_ddim(
    schedule: Schedule,
    steps: Steps,
    prediction: Prediction,
    *,
    clip: tuple[float, float] | None = None,
    eta: float = 0.0,
    reverse: bool = False,
) -> Plan: ...
def make_ddpm(
    schedule: Schedule,
    steps: Steps,
    prediction: Prediction,
    *,
    clip: tuple[float, float] | None = None,
    variance: Variance = ...,
) -> Plan: ...
def make_pndm(
    schedule: Schedule, steps: Steps, prediction: Prediction, *, skip_prk_steps: bool = True
) -> Plan: ...
def make_dpm_solver(
    schedule: Schedule, steps: Steps, prediction: Prediction, *, clip: tuple[float, float] | None = None
) -> Plan: ...
def make_rflow(
    steps: int,
    *,
    train_timesteps: int = 1000,
    steps_offset: int = 0,
    start: int = 0,
    use_discrete_timesteps: bool = True,
    use_timestep_transform: bool = False,
    input_img_size_numel: int = 32768,
    base_img_size_numel: int = 32768,
    spatial_dim: int = 3,
    monai: bool = False,
) -> Plan: ...
def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def normal(
    seeds: NDArray[np.uint64],
    samples: NDArray[np.uint64],
    step: int,
    shape: Sequence[int],
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    """Standard normals `[N, *shape]` by (seed, sample, step); step 0 is the initial noise, i + 1 row i's."""

class Timing:
    """Seconds spent by `run`, and within its network calls."""

    @property
    def total_s(self) -> float: ...
    @property
    def network_s(self) -> float: ...

def run(
    plan: Plan,
    x: NDArray[Any],
    network: Callable[[int, NDArray[Any], Branch], NDArray[Any]],
    seeds: NDArray[np.uint64],
    samples: NDArray[np.uint64],
    *,
    guidance: float | None = None,
    doubled: bool = False,
    on_step: Callable[[int, int], object] | None = None,
) -> Timing:
    """Runs the plan on x `[N, ...]` (float32 or float64) in place.

    `network(step, x, branch)` returns an array of x's shape and dtype. The x it is shown is read-only and the same
    array at every step, so copy what must last. `guidance` w gives u + w*(c - u): one BOTH call if `doubled`, else
    two. `on_step(done, total)` follows each row. What it, the network or Ctrl-C raises stops the loop.
    """
