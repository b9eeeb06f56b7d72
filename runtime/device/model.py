"""The device programs of an artifact with their weights on one device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from volcast.runtime.artifact import MANIFEST
from volcast.runtime.atomic import sha256
from volcast.runtime.spec import TensorSpec

from .golden import check_convolutions
from .program import WEIGHTS, DeviceProgram, DeviceProgramName, read_programs

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Described = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@final
class DeviceModel:
    """Read from `ARTIFACT/engines/cuda`. Everything that runs on the device shares these weights.

    Attributes:
        dtype: that volumes and tokens have.
        bytes: what the weights take.
    """

    def __init__(self, artifact: Path, device: torch.device) -> None:
        """Raises ValueError for programs that are missing, damaged or of another artifact."""
        folder = artifact / "engines" / "cuda"
        programs = read_programs(folder, sha256(artifact / MANIFEST))
        try:
            stored = load_file(folder / WEIGHTS, device=str(device))
        except SafetensorError as error:
            raise ValueError(
                f"[cuda] {folder / WEIGHTS}: {error}; run `volcast build --target cuda` again"
            ) from error
        for name, program in programs.programs.items():
            missing = sorted(key for key in program.weights() if f"{name}/{key}" not in stored)
            if missing:
                raise ValueError(
                    f"[cuda] {folder / WEIGHTS} lacks {missing[0]}; run `volcast build --target cuda` again"
                )
        self.device = device
        self.dtype = DTYPES[programs.precision]
        self._programs = programs.programs
        self._checked: set[DeviceProgramName] = set()
        self._weights: dict[DeviceProgramName, dict[str, Tensor]] = {}
        for name, program in programs.programs.items():
            own = {key: stored[f"{name}/{key}"] for key in program.weights()}
            if device.type == "cuda":
                from .fused import pack

                own = pack(program, own)
            self._weights[name] = own
        tensors = {x.data_ptr(): x.nbytes for own in self._weights.values() for x in own.values()}
        self.bytes = sum(tensors.values())

    def program(self, name: DeviceProgramName) -> DeviceProgram:
        if name not in self._programs:
            raise ValueError(
                f"[cuda] the device programs hold no {name}; run `volcast build --target cuda` again"
            )
        return self._programs[name]

    def weights(self, name: DeviceProgramName) -> dict[str, Tensor]:
        """The weights of one program, by the names that its operations give them."""
        self.program(name)
        return self._weights[name]

    def check(self, name: DeviceProgramName, inputs: Described) -> None:
        """Raise ValueError where the device's library gets a convolution of the program wrong; asked once a program."""
        if name not in self._checked:
            check_convolutions(self.program(name), self.weights(name), inputs, self.device)
            self._checked.add(name)

    def described(self, tensors: Mapping[str, tuple[TensorSpec, tuple[int, ...]]]) -> Described:
        """Shape and dtype of inputs: vectors and numbers keep the manifest's, volumes and tokens have the model's."""
        return {
            name: (
                shape,
                self.dtype if len(shape) > 2 and spec.dtype != "int64" else getattr(torch, spec.dtype),
            )
            for name, (spec, shape) in tensors.items()
        }

    def offset(self, name: DeviceProgramName, value: str) -> Tensor | None:
        """What to add to an input before the program reads it."""
        key = self.program(name).offsets.get(value)
        return None if key is None else self._weights[name][key]
