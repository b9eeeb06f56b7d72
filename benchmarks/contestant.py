"""What every contestant is given, what it measures, and the protocol that a worker drives."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, final

import numpy as np
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")
Part = Literal["prepare", "network", "decode"]


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """The work, the same for all: one volume at batch 1 from the same noise.

    Attributes:
        artifact: volcast's folder.
        bundle: the MONAI bundle that it was exported from; None where no peer needs it.
        plain: the folder of the plain ONNX export; None where nobody needs it.
        steps: DDIM steps, spaced as MONAI 1.6.1 spaces them.
        threads: inside an operator.
        seed: volcast's, which gives `noise` again.
        noise: float32 `[1, C, D', H', W']`.
        conditions: by name, without a batch axis.
        weights: sha256 of the weight files by the role in the bundle's provenance.
    """

    artifact: Path
    bundle: Path | None
    plain: Path | None
    steps: int
    threads: int
    seed: int
    noise: NDArray[np.float32]
    conditions: Mapping[str, NDArray[np.generic]]
    weights: Mapping[str, str]


@final
@dataclass(frozen=True, kw_only=True)
class Round:
    """One volume, in seconds of wall time; `peak_bytes` is the process's peak of resident memory meanwhile, `device_bytes`
    what an engine has reserved on a device of its own.

    `network_s` is what the calls of the denoising network took together, `prepare_s` what networks took that run
    once a request (volcast's schedule and prepare), `decode_s` the decoder.
    """

    total_s: float
    prepare_s: float
    network_s: float
    decode_s: float
    peak_bytes: int
    device_bytes: int = 0

    def figures(self, steps: int) -> dict[str, float]:
        """Milliseconds of a network call, of a step with everything around it, of a decode; seconds of a volume;
        volumes a minute; percent of the volume's time outside every network; MiB of the process and of a device."""
        outside = self.total_s - self.prepare_s - self.network_s - self.decode_s
        return {
            "network_ms": 1e3 * self.network_s / steps,
            "step_ms": 1e3 * (self.total_s - self.decode_s) / steps,
            "decode_ms": 1e3 * self.decode_s,
            "volume_s": self.total_s,
            "volumes_per_minute": 60 / self.total_s,
            "outside_percent": 100 * outside / self.total_s,
            "peak_mib": self.peak_bytes / 2**20,
            "device_mib": self.device_bytes / 2**20,
        }


class Contestant(ABC):
    """One way to sample. It lives in a process of its own and is opened once."""

    @abstractmethod
    def __init__(self, task: Task) -> None:
        """Load and compile what can be compiled ahead (ValueError: bad input; anything else: it cannot run)."""

    @abstractmethod
    def volume(self, clock: Clock) -> NDArray[np.float32]:
        """Sample the task's volume `[C, D, H, W]`, telling `clock` what the networks took."""


@final
class Clock:
    """Seconds by part, added up over calls, and the bytes reserved on a device. One for each volume."""

    def __init__(self) -> None:
        self.seconds: dict[Part, float] = {"prepare": 0.0, "network": 0.0, "decode": 0.0}
        self.device_bytes = 0

    def call(self, part: Part, function: Callable[P, R], *arguments: P.args, **keywords: P.kwargs) -> R:
        """Call `function` and add what it took to `part`."""
        began = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            self.seconds[part] += time.perf_counter() - began


def relative_error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """|found - wanted| / |wanted| in the L2 norm, computed in float64 (ValueError: the shapes differ)."""
    if found.shape != wanted.shape:
        raise ValueError(
            f"[bench] a volume of shape {found.shape} cannot be compared with one of {wanted.shape}"
        )
    reference = wanted.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - reference) / np.linalg.norm(reference))
