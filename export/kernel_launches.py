"""From a use of a kernel to its launches, on tensors that have a shape and no memory."""

from __future__ import annotations

import torch
from torch import Tensor
from volcast.kernels.attention_triton import attention_launches
from volcast.kernels.input_head_triton import input_head_launches

from volcast.kernels.group_norm_triton import group_norm_launches
from volcast.kernels.launch_triton import Launch
from volcast.kernels.output_head_triton import output_head_launches
from volcast.kernels.sampler_step_triton import sampler_step_launches
from volcast.kernels.upsample_convolution_triton import upsample_convolution_launches

from .kernel_uses import KernelUse, Shape


def use_launches(use: KernelUse, dtype: torch.dtype, capability: int) -> list[Launch]:
    """The launches of one use in `dtype` on a compute capability (90 for 9.0).

    Parameters of norms and biases are float32, weights of convolutions `dtype`.
    """
    shapes, settings = use.shapes, use.settings
    x = _volume(shapes["x"], dtype) if "x" in shapes else None
    match use.operation:
        case "group_norm":
            assert x is not None
            affine = _flat(x.shape[1])
            groups, eps, activation = settings["groups"], settings["eps"], settings["activation"]
            return group_norm_launches(x, groups, affine, affine, eps, activation, None, None, None)[2]
        case "output_head":
            assert x is not None
            affine, weight = _flat(x.shape[1]), _flat(*shapes["weight"], dtype=dtype)
            bias = _flat(shapes["weight"][0])
            groups, eps, activation = settings["groups"], settings["eps"], settings["activation"]
            return output_head_launches(x, groups, affine, affine, weight, bias, eps, activation)[1]
        case "input_head":
            assert x is not None
            weight, bias = _flat(*shapes["weight"], dtype=dtype), _flat(shapes["weight"][0])
            return input_head_launches(x, weight, bias)[1]
        case "upsample_convolution":
            assert x is not None
            phases, channels = 2 ** (x.ndim - 2), settings["channels"]
            weight = _flat(phases, phases, x.shape[1], channels, dtype=dtype)
            return upsample_convolution_launches(x, weight, _flat(channels), capability)[1]
        case "attention":
            q, k = (_heads(shapes[name], dtype) for name in ("q", "k"))
            return attention_launches(q, k, k, q.shape[-1] ** -0.5)[1]
        case "sampler_step":
            assert x is not None
            return _sampler_step(x.float(), dtype)
    raise ValueError(f"[build] operation {use.operation!r} has no kernel")


def _sampler_step(x: Tensor, dtype: torch.dtype) -> list[Launch]:
    """With and without guidance; with all that any plan keeps, so that one cubin runs every scheduler."""
    n = x.shape[0]
    out = x.to(dtype)
    rows = (_flat(1, 11, dtype=torch.float64), _flat(1, 6, dtype=torch.int32))
    counter = _flat(2 + n, dtype=torch.int32)
    seeds = _flat(n, dtype=torch.int64)
    weight = _flat(n, dtype=torch.float64)
    history = x.expand(3, *x.shape)
    return [
        launch
        for uncond, guidance in ((None, None), (out, weight))
        for launch in sampler_step_launches(
            x, out, uncond, guidance, history, x, out, *rows, counter, seeds, seeds
        )
    ]


def _volume(shape: Shape, dtype: torch.dtype) -> Tensor:
    n, c, *spatial = shape
    return torch.empty((n, *spatial, c), dtype=dtype, device="meta").movedim(-1, 1)


def _heads(shape: Shape, dtype: torch.dtype) -> Tensor:
    """`N H L D`, in memory `N L H D` as a linear layer leaves it."""
    n, heads, length, d = shape
    return torch.empty((n, length, heads, d), dtype=dtype, device="meta").transpose(1, 2)


def _flat(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
