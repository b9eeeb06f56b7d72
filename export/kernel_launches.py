"""From a use of a kernel to its launches, on tensors that have a shape and no memory."""

from __future__ import annotations

import torch
from torch import Tensor

from volcast.kernels.attention_triton import attention_launches
from volcast.kernels.group_norm_triton import group_norm_launches
from volcast.kernels.input_head_triton import input_head_launches
from volcast.kernels.launch_triton import Launch
from volcast.kernels.layer_norm_triton import layer_norm_launches
from volcast.kernels.output_head_triton import output_head_launches
from volcast.kernels.sampler_step_triton import sampler_step_launches
from volcast.kernels.upsample_convolution_triton import upsample_convolution_launches

from .kernel_uses import KernelUse, Shape

HISTORY = 4
"""Slots of the longest history among the plans: PNDM's."""


def use_launches(use: KernelUse, dtype: torch.dtype, capability: int) -> list[Launch]:
    """The launches of one use in `dtype` on a compute capability (90 for 9.0).

    Parameters of norms and biases are float32, weights of convolutions `dtype`.
    """
    settings, shape = use.settings, use.shapes.get("x", ())
    match use.operation:
        case "group_norm":
            x, weight, bias = _volume(shape, dtype), _flat(shape[1]), _flat(shape[1])
            groups, eps, activation = settings["groups"], settings["eps"], settings["activation"]
            return group_norm_launches(x, groups, weight, bias, eps, activation, None, None, None)[2]
        case "layer_norm":
            weight, bias = _flat(shape[2]), _flat(shape[2])
            return layer_norm_launches(_flat(*shape, dtype=dtype), weight, bias, settings["eps"], None, None)[
                2
            ]
        case "output_head":
            x, scale, offset = _volume(shape, dtype), _flat(shape[1]), _flat(shape[1])
            weight, bias = _convolution(use, dtype)
            groups, eps, activation = settings["groups"], settings["eps"], settings["activation"]
            return output_head_launches(x, groups, scale, offset, weight, bias, eps, activation)[1]
        case "input_head":
            return input_head_launches(_volume(shape, dtype), *_convolution(use, dtype))[1]
        case "upsample_convolution":
            phases, channels = 2 ** (len(shape) - 2), settings["channels"]
            packed = _flat(phases, phases, shape[1], channels, dtype=dtype)
            return upsample_convolution_launches(_volume(shape, dtype), packed, _flat(channels), capability)[
                1
            ]
        case "attention":
            q, k, v = (_heads(use.shapes[name], dtype) for name in ("q", "k", "k"))
            return attention_launches(q, k, v, settings["scale"])[1]
        case "sampler_step" | "sampler_step_guided":
            return _sampler_step(use, dtype)
    raise NotImplementedError(f"operation {use.operation!r}")  # no ValueError: that leaves a use out


def _sampler_step(use: KernelUse, dtype: torch.dtype) -> list[Launch]:
    """Keeping all that any plan keeps, so that one cubin runs every scheduler."""
    shape, steps = use.shapes["x"], use.settings["steps"]
    n = shape[0]
    x, saved, out, uncond, shown = (
        _volume(shape, kind) for kind in (torch.float32, torch.float32, dtype, dtype, dtype)
    )
    history = torch.stack([torch.empty_like(x.movedim(1, -1))] * HISTORY).movedim(-1, 2)
    guided = use.operation == "sampler_step_guided"
    other, weight = (uncond, _flat(n, dtype=torch.float64)) if guided else (None, None)
    table = _flat(steps, 11, dtype=torch.float64), _flat(steps, 6, dtype=torch.int32)
    counter = _flat(2 + n, dtype=torch.int32)
    seeds, samples = _flat(n, dtype=torch.int64), _flat(n, dtype=torch.int64)
    return sampler_step_launches(
        x, out, other, weight, history, saved, shown, *table, counter, seeds, samples
    )


def _volume(shape: Shape, dtype: torch.dtype) -> Tensor:
    n, c, *spatial = shape
    return torch.empty((n, *spatial, c), dtype=dtype, device="meta").movedim(-1, 1)


def _convolution(use: KernelUse, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _flat(*use.shapes["weight"], dtype=dtype), _flat(use.shapes["weight"][0])


def _heads(shape: Shape, dtype: torch.dtype) -> Tensor:
    """`N H L D`, in memory `N L H D` as a linear layer leaves it."""
    n, heads, length, d = shape
    return torch.empty((n, length, heads, d), dtype=dtype, device="meta").transpose(1, 2)


def _flat(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
