"""The TensorRT engine on the driver's host form: real plans, whose networks ONNX Runtime runs. Loading one needs its GPU."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from host_network import OrtNetwork

from volcast import _core
from volcast.runtime import engine_tensorrt, tensorrt_model
from volcast.runtime.engine_tensorrt import TensorRtEngine
from volcast.runtime.gpu import Gpu
from volcast.runtime.plans import Target, read_plans
from volcast.runtime.spec import ProgramSpec
from volcast.runtime.tensorrt_library import Library
from volcast.runtime.tensorrt_model import LoadedPlan, TensorRtModel

CAPABILITY = 86


class Device:
    """Counts the device's memory that is taken, with what a plan that is loaded takes for its weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.live = self.peak = 0
        real = _core.DeviceMemory

        def counted(driver: _core.Driver, size: int) -> _core.DeviceMemory:
            memory = real(driver, size)
            self.take(memory, size)
            return memory

        monkeypatch.setattr(_core, "DeviceMemory", counted)

    def take(self, owner: object, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(owner, self._give, size)

    def _give(self, size: int) -> None:
        self.live -= size


class Weights:
    """What loading a plan gives."""


def host_engine(
    folder: Path, target: Target, device: Device, monkeypatch: pytest.MonkeyPatch
) -> TensorRtEngine:
    """The engine for `target` and the artifact in `folder`; the driver, loading and running plans need a GPU else."""
    driver = _core.Driver.host()
    built = [read_plans(place).programs for place in (folder / "engines").iterdir()]
    weights = {plan.sha256: plan.weight_bytes for plans in built for plan in plans.values()}

    def scratch_bytes(name: str, sizes: Mapping[str, int]) -> int:
        """Stands for what the library says of the plan in hand: a share of what its builder said."""
        plan = built[0][name]
        most = math.prod(plan.ranges[axis].maximum for axis in plan.ranges)
        return (plan.scratch_bytes or 0) * math.prod(sizes[axis] for axis in plan.ranges) // most

    class Context:
        def __init__(self, library: Library, plan: LoadedPlan, program: ProgramSpec, cache: Path) -> None:
            self._name = Path(program.file).stem

        def shape(self, sizes: Mapping[str, int]) -> int:
            return scratch_bytes(self._name, sizes)

    monkeypatch.setattr(
        engine_tensorrt, "local_gpu", lambda operation: Gpu(name="A", capability=CAPABILITY, driver=driver)
    )
    monkeypatch.setattr(tensorrt_model, "Context", Context)

    def deserialize(self: Library, plan: bytes, host_code: bool) -> tuple[Any, Any]:
        loaded = Weights()
        device.take(loaded, weights[sha256(plan).hexdigest()])
        return None, loaded

    def network(
        self: TensorRtModel, path: Path, program: ProgramSpec, sizes: Mapping[str, int]
    ) -> OrtNetwork:
        plan = self._load(path.stem, path)
        made = OrtNetwork(driver, path, program, sizes, scratch_bytes(path.stem, sizes))
        made.plan = plan
        return made

    monkeypatch.setattr(TensorRtModel, "network", network)
    engine = TensorRtEngine(target)
    monkeypatch.setattr(type(engine._library), "deserialize", deserialize)
    return engine
