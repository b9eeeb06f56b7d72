"""One device program called with arrays: what `Model.decode`, `Model.encode` and `volcast verify` use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from volcast.runtime.engine import Arrays, Program, shapes
from volcast.runtime.spec import ProgramSpec

from .device import Device
from .executor import Executor
from .model import DeviceModel


@final
class DeviceRun(Program):
    """A program bound to fixed shapes. Outputs are float32 arrays of the caller's."""

    def __init__(
        self, device: Device, model: DeviceModel, name: Any, program: ProgramSpec, sizes: Mapping[str, int],
        memory_limit: int | None,
    ) -> None:  # fmt: skip
        """Raises ValueError for a program that the device programs lack, and where memory does not suffice."""
        bound = shapes(program, sizes)
        described = model.described({tensor.name: (tensor, bound[tensor.name]) for tensor in program.inputs})
        self._device, self._model, self._name = device, model, name
        with device.errors(), torch.inference_mode():
            model.check(name, described)
            self._executor = Executor(model.program(name), model.weights(name), described, device.torch)
            taken = model.bytes + self._executor.plan.bytes
        if memory_limit is not None and taken > memory_limit:
            raise ValueError(
                f"[cuda] memory_limit={memory_limit}: {name} at once takes {taken} bytes with the weights; raise the "
                "limit or give a smaller size; sampling decodes in slabs"
            )

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        with self._device.errors(), torch.inference_mode():
            for name, buffer in self._executor.inputs.items():
                value = torch.from_numpy(np.ascontiguousarray(inputs[name])).to(buffer.device)
                offset = self._model.offset(self._name, name)
                buffer.copy_(value if offset is None else value + offset)
            self._executor.run()
            return {
                name: value.float().cpu().contiguous().numpy().copy()
                for name, value in self._executor.outputs.items()
            }
