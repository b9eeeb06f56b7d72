"""Device operations in float64, by PyTorch's own operators: the oracle of the programs' tests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from volcast.runtime.device.operations import evaluate
from volcast.runtime.device.program import Operation


def exact(operation: Operation, inputs: list[Any]) -> list[Tensor]:
    """One operation in float64, by PyTorch's own operators: what `evaluate` is to compute, without the kernels' code."""
    s = operation.settings
    kind = operation.kind
    x = inputs[0]
    if kind == "attention":
        q, k, v = (t.unflatten(-1, (s["heads"], -1)).transpose(1, 2) for t in inputs)
        results = [F.scaled_dot_product_attention(q, k, v, scale=s["scale"]).transpose(1, 2).flatten(2)]
    elif kind == "group_norm":
        _, weight, bias, shift, residual, second = (*inputs, None, None, None)[:6]
        h = x if shift is None else x + shift.reshape(*shift.shape, *(1,) * (x.ndim - 2))
        h = h if residual is None else h + residual
        v = h if second is None else torch.cat([h, second], 1)
        y = F.group_norm(v, s["groups"], weight, bias, s["eps"])
        results = [F.silu(y) if s["activation"] == "silu" else y, h]
    elif kind == "layer_norm":
        _, weight, bias, shift, residual = (*inputs, None, None)[:5]
        h = x if shift is None else x + shift[:, None]
        h = h if residual is None else h + residual
        results = [F.layer_norm(h, h.shape[2:], weight, bias, s["eps"]), h]
    elif kind == "input_head":
        results = [{4: F.conv2d, 5: F.conv3d}[x.ndim](*inputs, padding=1)]
    elif kind == "output_head":
        y = F.group_norm(x, s["groups"], inputs[1], inputs[2], s["eps"])
        y = F.silu(y) if s["activation"] == "silu" else y
        results = [{4: F.conv2d, 5: F.conv3d}[x.ndim](y, *inputs[3:], padding=1)]
    elif kind == "upsample_convolution":
        results = [_upsampled(x, *inputs[1:])]
    elif kind == "pointwise":
        results = _steps(inputs, json.loads(s["program"]), s["results"])
    elif kind == "softmax":
        results = [torch.softmax(x, s["axis"])]
    else:
        results = evaluate(operation, inputs)
    assert all(y.dtype == torch.float64 for y in results)
    return results[: len(operation.outputs)]


def _upsampled(x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[2i + p] = sum over t of w[p, t] x[i + p + t - 1] is a transposed convolution with tap 3 - p - 2t."""
    axes = x.ndim - 2
    phases = list(itertools.product((0, 1), repeat=axes))
    taps = weights.new_zeros(*weights.shape[2:], *(4,) * axes)
    for p, phase in enumerate(phases):
        for t, tap in enumerate(phases):
            taps[(..., *(3 - a - 2 * b for a, b in zip(phase, tap, strict=True)))] = weights[p, t]
    return {2: F.conv_transpose2d, 3: F.conv_transpose3d}[axes](x, taps, bias, stride=2, padding=1)


def _steps(inputs: list[Tensor], steps: list[list[Any]], results: list[int]) -> list[Tensor]:
    largest = max(inputs, key=lambda x: (x.numel(), x.ndim))
    ones = (1,) * (largest.ndim - 2)
    registers = []
    for x in inputs:
        channels = x.shape[-1] if x.ndim == 1 else x.shape[1]
        spread = (1, *ones, channels) if largest.ndim == 3 else (1, channels, *ones)
        spread = (-1, *spread[1:])
        registers.append(x if x.shape == largest.shape else x.reshape(spread))
    for name, *of in steps:
        if name == "constant":
            registers.append(torch.tensor(of[0], dtype=torch.float64))
        elif name in _OF_TWO:
            registers.append(_OF_TWO[name](registers[of[0]], registers[of[1]]))
        else:
            registers.append(_OF_ONE[name](registers[of[0]], *of[1:]))
    return [registers[result].expand_as(largest) for result in results]


_OF_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div,
}  # fmt: skip
_OF_ONE: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg, "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu, "relu": F.relu, "exp": torch.exp,
    "sqrt": torch.sqrt, "sin": torch.sin, "cos": torch.cos, "leaky_relu": F.leaky_relu, "clamp": torch.clamp,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip
