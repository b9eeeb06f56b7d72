"""The input head of MONAI's networks: a convolution from one or a few channels.

    y = conv(x) + bias        3^3 or 3^2 taps, stride 1, zero padding 1

float16 and bfloat16 inputs have their sums in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .check import (
    channels_last,
    check_device_shared,
    check_dtype,
    check_parameter,
    check_volume,
    empty_channels_last,
)
from .impl import Impl, resolve_impl

# Input channels that one product takes together with their taps; past it a convolution of its own is the better form.
MAX_CHANNELS = {4: 16, 5: 8}
LARGEST = 2**31 - 2**16  # voxels of a sample: their number, rounded up to a tile, fits in 32 bits


def input_head(
    x: Tensor,  # N Cin D H W or N Cin H W, channels last
    weight: Tensor,  # [C, Cin, 3, 3, 3] or [C, Cin, 3, 3], as torch.nn.Conv3d and Conv2d have it
    bias: Tensor,  # [C]
    *,
    impl: Impl | str | None = None,
) -> Tensor:  # N C D H W, channels last
    """`torch.nn.Conv3d(Cin, C, 3, padding=1)` for few input channels.

    dtypes float32, float16, bfloat16; weight in x's dtype, bias in float32 or x's dtype. Raises ValueError for another
    dtype, layout or shape, for more than 8 input channels (16 of an image) and for over 2^31 - 2^16 voxels.
    """
    _check(x, weight, bias)
    if impl is None:
        return torch.ops.volcast.input_head(x, weight, bias)  # type: ignore[no-any-return]
    form = _triton if resolve_impl("input_head", impl, x, weight, bias) is Impl.TRITON else _eager
    return form(x, weight, bias)


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    convolution = F.conv3d if x.ndim == 5 else F.conv2d
    y = convolution(x, weight, bias.to(x.dtype), padding=1)
    return channels_last(y)


def _triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from .input_head_triton import input_head_launches
    from .launch_triton import run

    y, launches = input_head_launches(x, weight, bias)
    run(launches, x.device)
    return y


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_volume("input_head", "x", x)
    check_dtype("input_head", x=x, weight=weight)
    inputs, axes = x.shape[1], x.ndim - 2
    if inputs > MAX_CHANNELS[x.ndim]:
        raise ValueError(
            f"[input_head] x has {inputs} channels: need at most {MAX_CHANNELS[x.ndim]}; "
            "more are a convolution's work"
        )
    if weight.ndim != x.ndim or weight.shape[0] == 0:
        kernel = ", ".join(["3"] * axes)
        raise ValueError(f"[input_head] weight has shape {tuple(weight.shape)}: need (C, {inputs}, {kernel})")
    check_parameter("input_head", "weight", weight, (weight.shape[0], inputs, *(3,) * axes), x)
    check_parameter("input_head", "bias", bias, (weight.shape[0],), x)
    check_device_shared("input_head", x=x, weight=weight, bias=bias)
    if x.shape[2:].numel() > LARGEST:
        raise ValueError(f"[input_head] x has {x.shape[2:].numel()} voxels: need at most 2^31 - 2^16; cut it")


@torch.library.custom_op("volcast::input_head", mutates_args=())
def _input_head_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    form = _triton if resolve_impl("input_head", None, x) is Impl.TRITON else _eager
    return form(x, weight, bias)


@_input_head_op.register_fake
def _input_head_fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return empty_channels_last((x.shape[0], weight.shape[0], *x.shape[2:]), x)
