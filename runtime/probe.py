"""The smallest request that shows whether a model samples."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import final

import numpy as np

from .interface import Array, as_bytes, inputs
from .service import Reason, Reply, Service
from .sizes import default_sizes
from .spec import ArtifactSpec, Manifest


def probe_tensors(spec: Manifest) -> dict[str, Array]:
    """Inputs of a request for one step, where a model has steps; conditions that must be given at their least."""
    dtypes = {tensor.name: tensor.dtype for tensor in inputs(spec)}
    found: dict[str, Array] = {
        "seed": np.array([0], np.uint64), "priority": np.array([8], np.int32), "output_format": as_bytes("nifti"),
    }  # fmt: skip
    sizes = default_sizes(spec)
    if isinstance(spec, ArtifactSpec):
        found["steps"] = np.array([1], np.int32)
    for condition in spec.conditions:
        if not condition.fields:
            shape = [
                sizes.get(one, spec.axis(one).minimum) if isinstance(one, str) else one
                for one in condition.shape
            ]
            found[condition.name] = np.full(shape or [1], condition.minimum or 0, dtypes[condition.name])
    return found


def warm_up(service: Service, spec: Manifest) -> None:
    """Sample once, so that the first caller waits for no memory. ValueError: why no volume comes."""
    answer = _Answer()
    service.accept(probe_tensors(spec), answer)
    answer.wait()


@final
class _Answer(Reply):
    def __init__(self) -> None:
        self._ended = threading.Event()
        self._fault: str | None = None

    def send(self, tensors: Mapping[str, Array]) -> None:
        pass

    def finish(self) -> None:
        self._ended.set()

    def fail(self, reason: Reason, text: str) -> None:
        self._fault = text
        self._ended.set()

    def cancelled(self) -> bool:
        return False

    def wait(self) -> None:
        self._ended.wait()
        if self._fault is not None:
            raise ValueError(self._fault)
