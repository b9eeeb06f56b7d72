"""Programs of MONAI's decoders, written by hand in the form that the device passes leave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from volcast.kernels import phase_weights
from volcast.runtime.device.program import DeviceProgram, Operation

ADD = '[["add",0,1]]'


class Decoder:
    """AutoencoderKL's or AutoencoderKlMaisi's: two residual blocks a level, `channels` from the first level down.

    `linear`: trilinear upsampling and a convolution, as MaisiUpsample; else the fused nearest one. `attention`: in the
    middle, as AutoencoderKL has it. Random weights, on `meta` without numbers.
    """

    def __init__(
        self, channels: tuple[int, ...], *, latent: int = 4, groups: int = 32, axes: int = 3, linear: bool = False,
        attention: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu", head: str = "none",
    ) -> None:  # fmt: skip
        self.groups, self.axes, self.dtype, self.device = groups, axes, dtype, device
        self.weights: dict[str, Tensor] = {}
        self.operations: list[Operation] = []
        width = channels[-1]
        x = self.convolution("z", latent, width)
        waiting: str | None = None  # what is still to be added to x
        if attention:
            x = self.attend(x, width)
        for level, out in reversed(list(enumerate(channels))):
            for _ in range(2):
                x, waiting = self.block(x, waiting, width, out)
                width = out
            if level:
                x, waiting = self.total(x, waiting), None
                x = self.upsample(x, width, linear)
        x = self.total(x, waiting)
        norm = [self.weight(width, mean=1), self.weight(width)]
        last = [self.weight(1, width, *(3,) * axes, dtype=dtype), self.weight(1)]
        settings = {"groups": groups, "eps": 1e-6, "activation": head}
        self.operations.append(
            Operation(kind="output_head", inputs=(x, *norm, *last), outputs=("image",), settings=settings)
        )
        self.program = DeviceProgram(inputs=("z",), outputs=("image",), operations=tuple(self.operations))

    def weight(self, *shape: int, mean: float = 0, dtype: torch.dtype = torch.float32) -> str:
        name = f"w{len(self.weights)}"
        fan = max(1, torch.Size(shape[1:]).numel())
        made = (
            torch.empty(shape, device="meta")
            if self.device == "meta"
            else mean + torch.randn(shape) / fan**0.5
        )
        self.weights[name] = made.to(dtype)
        return name

    def add(
        self, kind: Any, inputs: tuple[str | None, ...], settings: dict[str, Any], count: int = 1
    ) -> list[str]:
        names = [f"v{len(self.operations)}.{i}" for i in range(count)]
        self.operations.append(Operation(kind=kind, inputs=inputs, outputs=tuple(names), settings=settings))
        return names

    def convolution(self, x: str, width: int, out: int) -> str:
        weight = self.weight(out, width, *(3,) * self.axes, dtype=self.dtype)
        ones = [1] * self.axes
        settings = {"stride": ones, "padding": ones, "dilation": ones, "groups": 1}
        return self.add("convolution", (x, weight, self.weight(out)), settings)[0]

    def norm(self, x: str, waiting: str | None, width: int, activation: str = "silu") -> tuple[str, str]:
        """(normalised, the sum that was)."""
        inputs = (x, self.weight(width, mean=1), self.weight(width), None, waiting)
        settings = {"groups": self.groups, "eps": 1e-6, "activation": activation}
        if waiting is None:
            return self.add("group_norm", inputs[:3], settings)[0], x
        y, h = self.add("group_norm", inputs, settings, 2)
        return y, h

    def block(self, x: str, waiting: str | None, width: int, out: int) -> tuple[str, str | None]:
        y, h = self.norm(x, waiting, width)
        y, _ = self.norm(self.convolution(y, width, out), None, out)
        y = self.convolution(y, out, out)
        if width == out:
            return y, h
        skip = self.weight(width, out, dtype=self.dtype)
        return self.add("linear", (h, skip, self.weight(out), y), {})[0], None

    def total(self, x: str, waiting: str | None) -> str:
        return (
            x if waiting is None else self.add("pointwise", (x, waiting), {"program": ADD, "results": [2]})[0]
        )

    def upsample(self, x: str, width: int, linear: bool) -> str:
        if linear:
            settings = {"mode": "linear", "scale": [2.0] * self.axes, "align_corners": False}
            return self.convolution(self.add("resize", (x,), settings)[0], width, width)
        packed = self.weight(width, width, *(3,) * self.axes, dtype=self.dtype)
        self.weights[packed] = phase_weights(self.weights[packed])
        return self.add("upsample_convolution", (x, packed, self.weight(width)), {})[0]

    def attend(self, x: str, width: int) -> str:
        y, h = self.norm(x, None, width, "none")
        tokens = self.add("tokens", (y,), {})[0]
        qkv = self.add("linear", (tokens, self.weight(width, 3 * width, dtype=self.dtype)), {})[0]
        parts = [
            self.add("columns", (qkv,), {"start": i * width, "stop": (i + 1) * width})[0] for i in range(3)
        ]
        mixed = self.add("attention", tuple(parts), {"heads": 1, "scale": None})[0]
        out = self.add("linear", (mixed, self.weight(width, width, dtype=self.dtype)), {})[0]
        return self.total(self.add("volume", (out, h), {})[0], h)
