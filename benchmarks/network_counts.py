"""What a built network does, as far as shapes tell: operations, launches, FLOPs, bytes, roofline, planned memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from volcast.kernels.impl import Impl
from volcast.runtime.artifact import MANIFEST, read_artifact
from volcast.runtime.atomic import sha256
from volcast.runtime.device.cost import program_cost
from volcast.runtime.device.decoding import image_place
from volcast.runtime.device.executor import besides
from volcast.runtime.device.fused import launches
from volcast.runtime.device.memory import Spec, empty, is_view, shapes
from volcast.runtime.device.order import plan_order
from volcast.runtime.device.program import WEIGHTS, DeviceProgram, DeviceProgramName, read_programs
from volcast.runtime.device.slab_apply import FusedApply
from volcast.runtime.device.slab_plan import plan_slabs
from volcast.runtime.spec import TensorSpec

DTYPE = torch.float16
LIMIT = 80 * 10**9
"""Bytes of an H100: what does not fit is decoded in slabs."""


class Counted:
    """The device programs of an artifact on `meta`: no weight is read.

    `program(...)` gives for one run of `step` or `decode` a mapping with the row's numbers.
    """

    def __init__(self, folder: Path) -> None:
        self.spec = read_artifact(folder)
        place = folder / "engines" / "cuda"
        self._programs = read_programs(place, sha256(folder / MANIFEST)).programs
        with safe_open(place / WEIGHTS, "pt") as file:
            self._weights = {
                name: torch.empty(part.get_shape(), dtype=_dtype(part.get_dtype()), device="meta")
                for name in sorted(file.keys())
                for part in (file.get_slice(name),)
            }

    def program(self, name: DeviceProgramName, latent: tuple[int, ...], batch: int) -> dict[str, Any]:
        """One run at a latent of these spatial sizes."""
        program = self._programs[name]
        weights = {key: self._weights[f"{name}/{key}"] for key in program.weights()}
        inputs = {
            tensor.name: self._spec(tensor, latent, batch) for tensor in self.spec.programs[name].inputs
        }
        cost = program_cost(program, weights, inputs)
        specs = shapes(program, weights, inputs)
        kept = frozenset(program.inputs) - {"row"} if name == "step" else frozenset()
        held = sum(value.numel() * value.itemsize for value in weights.values())
        planned = plan_order(program, specs, kept)[1]
        # An image leaves the device in float32.
        image = 4 * math.prod(specs["image"][0]) if name == "decode" else 0
        arena = image_place(planned, specs["image"])[1] if name == "decode" else planned.bytes
        peak = held + arena + besides(program, weights, specs, Impl.TRITON)
        launched, slabs = None, None
        if peak <= LIMIT:
            launched = _launches(program, weights, specs)
        else:
            slabs = plan_slabs(program, weights, inputs, LIMIT - image, FusedApply())
            peak = slabs.peak_bytes + image
        return {
            "operations": cost.kinds,
            "launches": launched,
            "flops": cost.flops,
            "bytes": cost.bytes,
            "roofline_ms": cost.roofline_ms,
            "weight_bytes": held,
            "peak_bytes": peak,
            "slabs": None
            if slabs is None
            else {"passes": len(slabs.passes), "roofline_ms": slabs.milliseconds},
        }

    def _spec(self, tensor: TensorSpec, latent: tuple[int, ...], batch: int) -> Spec:
        sizes = {"batch": batch, **{f"d{axis}": size for axis, size in enumerate(latent)}}
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape)
        wide = len(shape) > 2 and tensor.dtype != "int64"
        return shape, DTYPE if wide else getattr(torch, tensor.dtype)


def _launches(program: DeviceProgram, weights: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> int:
    """The kernels that a run launches, a library's call being one."""
    tensors = {**weights, **{name: empty(spec, "meta") for name, spec in specs.items()}}
    count = 0
    for operation in program.operations:
        if not is_view(program, operation):
            inputs = [None if name is None else tensors[name] for name in operation.inputs]
            found = launches(operation, inputs, [tensors[name] for name in operation.outputs])
            count += 1 if found is None else len(found)
    return count


def _dtype(name: str) -> torch.dtype:
    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}[name]
