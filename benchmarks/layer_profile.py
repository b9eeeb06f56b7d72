"""Where the time of a program goes in OpenVINO: which kernel runs each kind of layer, how often, how long."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from volcast.runtime.engine import shapes
from volcast.runtime.engine_openvino import openvino
from volcast.runtime.spec import ProgramSpec


@final
@dataclass(frozen=True, kw_only=True)
class Kernel:
    """All layers of a `kind` that one `kernel` runs (OpenVINO's names; I8 and i8 are integer kernels).

    `milliseconds` is the sum of every layer's median.
    """

    kind: str
    kernel: str
    layers: int
    milliseconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "kernel": self.kernel,
            "layers": self.layers,
            "ms": round(self.milliseconds, 3),
        }


def layer_profile(
    path: Path, program: ProgramSpec, sizes: Mapping[str, int], threads: int, repeats: int
) -> list[Kernel]:
    """The kernels of the ONNX file at fixed `sizes`, the slowest first, by OpenVINO's own counters over `repeats` runs.

    The settings are those of the engine `openvino`.
    """
    core = openvino.Core()
    model = core.read_model(path)
    fixed = shapes(program, sizes)
    model.reshape({name: list(shape) for name, shape in fixed.items()})
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    compiled = core.compile_model(
        model, "CPU", {**settings, "INFERENCE_NUM_THREADS": threads, "PERF_COUNT": True}
    )
    request = compiled.create_infer_request()
    generator = np.random.default_rng(0)
    inputs = {name: generator.standard_normal(shape, np.float32) for name, shape in fixed.items()}
    taken: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for _ in range(repeats):
        request.infer(inputs)
        for layer in request.profiling_info:
            if layer.status == openvino.ProfilingInfo.Status.EXECUTED:
                key = (layer.node_type, layer.exec_type, layer.node_name)
                taken[key].append(1e3 * layer.real_time.total_seconds())
    kernels: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (kind, kernel, _), times in taken.items():
        kernels[kind, kernel].append(float(np.median(times)))
    found = [
        Kernel(kind=kind, kernel=kernel, layers=len(times), milliseconds=sum(times))
        for (kind, kernel), times in kernels.items()
    ]
    return sorted(found, key=lambda each: -each.milliseconds)


def capabilities() -> list[str]:
    """What OpenVINO says that this CPU computes fast: FP32, INT8, BF16 and so on."""
    return sorted(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
