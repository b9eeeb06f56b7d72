"""From a use of a kernel to its launches, on tensors that have a shape and no memory."""

from __future__ import annotations

import torch
from torch import Tensor

from volcast.kernels.group_norm_triton import group_norm_launches
from volcast.kernels.launch_triton import Launch

from .kernel_uses import KernelUse, Shape


def use_launches(use: KernelUse, dtype: torch.dtype) -> list[Launch]:
    """The launches of one use in `dtype`; parameters of norms are float32, of convolutions `dtype`."""
    shapes, settings = use.shapes, use.settings
    match use.operation:
        case "group_norm":
            channels = shapes["x"][1]
            affine = _flat(channels, dtype=torch.float32)
            return group_norm_launches(
                _volume(shapes["x"], dtype), settings["groups"], affine, affine, settings["eps"],
                settings["activation"], None, None, None,
            )[2]  # fmt: skip
    raise AssertionError(f"no launches for {use.operation}")


def _volume(shape: Shape, dtype: torch.dtype) -> Tensor:
    n, c, *spatial = shape
    return torch.empty((n, *spatial, c), dtype=dtype, device="meta").movedim(-1, 1)


def _flat(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
