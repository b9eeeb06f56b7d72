"""The output head of MONAI's networks: GroupNorm, SiLU or none, and a convolution to one or a few channels.

    y = conv(activation(group_norm(x))) + bias        3^3 or 3^2 taps, stride 1, padding 1

The padding applies after the activation: a voxel outside contributes 0, not silu(norm(0)). float16 and bfloat16 inputs
have their statistics, activation and sums in float32; the convolution reads the activation in x's dtype.
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
from .group_norm import Activation, check_norm
from .impl import Impl, resolve_impl

# Taps times output channels that one product has; past it a convolution of its own is the better form.
MAX_COLUMNS = 256
LARGEST = 2**31 - 2**16  # voxels of a sample: their number, rounded up to a tile, fits in 32 bits


def output_head(
    x: Tensor,  # N C D H W or N C H W, channels last
    groups: int,
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor,  # [C]
    weight: Tensor,  # [Cout, C, 3, 3, 3] or [Cout, C, 3, 3], as torch.nn.Conv3d and Conv2d have it
    bias: Tensor,  # [Cout]
    *,
    eps: float = 1e-6,
    activation: Activation = "silu",
    impl: Impl | str | None = None,
) -> Tensor:  # N Cout D H W, channels last
    """`torch.nn.GroupNorm` + `torch.nn.SiLU` + `torch.nn.Conv3d(C, Cout, 3, padding=1)` in one operation.

    MONAI's UNets end so; its decoders have no SiLU there (activation="none").

    dtypes float32, float16, bfloat16; weight in x's dtype, the other parameters in float32 or x's dtype. Raises
    ValueError for another dtype, layout or shape, for groups that do not divide the channels, for eps outside (0, 1),
    for more than 9 output channels (28 of an image) and for over 2^31 - 2^16 voxels.
    """
    _check(x, groups, norm_weight, norm_bias, weight, bias, eps, activation)
    if impl is None:
        return torch.ops.volcast.output_head(x, groups, norm_weight, norm_bias, weight, bias, eps, activation)  # type: ignore[no-any-return]
    form = (
        _triton
        if resolve_impl("output_head", impl, x, norm_weight, norm_bias, weight, bias) is Impl.TRITON
        else _eager
    )
    return form(x, groups, norm_weight, norm_bias, weight, bias, eps, activation)


def _eager(
    x: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float,
    activation: str,
) -> Tensor:  # fmt: skip
    v = torch.group_norm(x, groups, norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps)
    v = F.silu(v) if activation == "silu" else v
    convolution = F.conv3d if x.ndim == 5 else F.conv2d
    y = convolution(v, weight, bias.to(x.dtype), padding=1)
    return channels_last(y)


def _triton(
    x: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float,
    activation: str,
) -> Tensor:  # fmt: skip
    from .launch_triton import run
    from .output_head_triton import output_head_launches

    y, launches = output_head_launches(x, groups, norm_weight, norm_bias, weight, bias, eps, activation)
    run(launches, x.device)
    return y


def _check(
    x: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float,
    activation: str,
) -> None:  # fmt: skip
    check_volume("output_head", "x", x)
    check_dtype("output_head", x=x, weight=weight)
    channels, axes = x.shape[1], x.ndim - 2
    check_norm("output_head", channels, groups, eps, activation)
    most = MAX_COLUMNS // 3**axes
    if weight.ndim != x.ndim or not 1 <= weight.shape[0] <= most:
        kernel = ", ".join(["3"] * axes)
        raise ValueError(
            f"[output_head] weight has shape {tuple(weight.shape)}: need (Cout, {channels}, {kernel}) with Cout from 1 "
            f"to {most}; more output channels are a convolution's work"
        )
    outputs = weight.shape[0]
    check_parameter("output_head", "norm_weight", norm_weight, (channels,), x)
    check_parameter("output_head", "norm_bias", norm_bias, (channels,), x)
    check_parameter("output_head", "weight", weight, (outputs, channels, *(3,) * axes), x)
    check_parameter("output_head", "bias", bias, (outputs,), x)
    check_device_shared(
        "output_head", x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias
    )
    if x.shape[2:].numel() > LARGEST:
        raise ValueError(
            f"[output_head] x has {x.shape[2:].numel()} voxels: need at most 2^31 - 2^16; cut it"
        )


@torch.library.custom_op("volcast::output_head", mutates_args=())
def _output_head_op(
    x: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float,
    activation: str,
) -> Tensor:  # fmt: skip
    form = _triton if resolve_impl("output_head", None, x) is Impl.TRITON else _eager
    return form(x, groups, norm_weight, norm_bias, weight, bias, eps, activation)


@_output_head_op.register_fake
def _output_head_fake(
    x: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float,
    activation: str,
) -> Tensor:  # fmt: skip
    return empty_channels_last((x.shape[0], weight.shape[0], *x.shape[2:]), x)
