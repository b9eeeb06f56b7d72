"""GroupNorm (arXiv:1803.08494) with what surrounds it in MONAI's networks: shift, residual, concat, SiLU.

    h = x + shift[n, c] + residual                  the sum, in x's channels
    v = cat([h, second], channels)
    y = activation((v - mean_g) / sqrt(var_g + eps) * weight + bias)

mean_g and var_g (biased) run over the voxels and channels of a group, which may straddle the border of the concat.
float16 and bfloat16 inputs have their sums, statistics and activation in float32.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .check import (
    channels_last,
    check_device_shared,
    check_dtype,
    check_parameter,
    check_shape,
    check_shift,
    check_volume,
    empty_channels_last,
)
from .impl import Impl, resolve_impl

Activation = Literal["none", "silu"]


def group_norm(
    x: Tensor,  # N C D H W or N C H W, channels last
    groups: int,
    weight: Tensor,  # [C + C2]
    bias: Tensor,  # [C + C2]
    *,
    eps: float = 1e-6,
    activation: Activation = "none",
    shift: Tensor | None = None,  # [N, C]: the time embedding, or the convolution's bias; any stride along N
    second: Tensor | None = None,  # N C2 D H W: concatenated after x, never copied
    impl: Impl | str | None = None,
) -> Tensor:  # N C+C2 D H W, channels last
    """Group normalisation of `cat([x + shift, second])`. `torch.nn.GroupNorm` + `torch.nn.SiLU` in one operation.

    dtypes float32, float16, bfloat16; weight, bias and shift in float32 or x's dtype. Raises ValueError for another
    dtype, layout or shape, for groups that do not divide the channels, for eps outside (0, 1).
    """
    _check("group_norm", x, groups, weight, bias, eps, activation, shift, None, second)
    if impl is None:
        return torch.ops.volcast.group_norm(x, groups, weight, bias, eps, activation, shift, second)  # type: ignore[no-any-return]
    form = (
        _triton if resolve_impl("group_norm", impl, x, weight, bias, shift, second) is Impl.TRITON else _eager
    )
    return form(x, groups, weight, bias, eps, activation, shift, None, second)[0]


def add_group_norm(
    x: Tensor,  # N C D H W or N C H W, channels last
    residual: Tensor,  # as x
    groups: int,
    weight: Tensor,  # [C + C2]
    bias: Tensor,  # [C + C2]
    *,
    eps: float = 1e-6,
    activation: Activation = "none",
    shift: Tensor | None = None,  # [N, C]
    second: Tensor | None = None,  # N C2 D H W
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor]:
    """`(y, h)`: the sum h = x + shift + residual is written once, for the next residual; y is `group_norm` of it.

    Takes and raises what `group_norm` does.
    """
    _check("add_group_norm", x, groups, weight, bias, eps, activation, shift, residual, second)
    if impl is None:
        y, h = torch.ops.volcast.add_group_norm(
            x, residual, groups, weight, bias, eps, activation, shift, second
        )
        return y, h
    form = (
        _triton
        if resolve_impl("add_group_norm", impl, x, residual, weight, bias, shift, second) is Impl.TRITON
        else _eager
    )
    return form(x, groups, weight, bias, eps, activation, shift, residual, second)


def _eager(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str,
    shift: Tensor | None, residual: Tensor | None, second: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h = x if shift is None else x + shift.to(x.dtype)[(...,) + (None,) * (x.ndim - 2)]
    h = h if residual is None else h + residual
    v = h if second is None else torch.cat([h, second], 1)
    y = torch.group_norm(v, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    y = F.silu(y) if activation == "silu" else y
    return channels_last(y), h


def _triton(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str,
    shift: Tensor | None, residual: Tensor | None, second: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .group_norm_triton import group_norm_launches
    from .launch_triton import run

    y, h, launches = group_norm_launches(x, groups, weight, bias, eps, activation, shift, residual, second)
    run(launches, x.device)
    return y, h


def check_norm(operation: str, channels: int, groups: int, eps: float, activation: str) -> None:
    """Raise ValueError for settings of a norm that are none."""
    if groups < 1 or channels % groups:
        raise ValueError(
            f"[{operation}] groups={groups} with {channels} channels: need a divisor of {channels}"
        )
    if not 0 < eps < 1:
        raise ValueError(f"[{operation}] eps={eps}: need a number between 0 and 1")
    if activation not in ("none", "silu"):
        raise ValueError(f"[{operation}] activation={activation!r}: need 'none' or 'silu'")


def _check(
    operation: str, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str,
    shift: Tensor | None, residual: Tensor | None, second: Tensor | None,
) -> None:  # fmt: skip
    check_volume(operation, "x", x)
    channels = x.shape[1]
    if second is not None:
        check_volume(operation, "second", second)
        check_shape(operation, "second", second, (x.shape[0], second.shape[1], *x.shape[2:]))
        channels += second.shape[1]
    if residual is not None:
        check_volume(operation, "residual", residual)
        check_shape(operation, "residual", residual, tuple(x.shape))
    check_dtype(operation, x=x, residual=residual, second=second)
    check_norm(operation, channels, groups, eps, activation)
    check_parameter(operation, "weight", weight, (channels,), x)
    check_parameter(operation, "bias", bias, (channels,), x)
    if shift is not None:
        check_shift(operation, shift, (x.shape[0], x.shape[1]), x)
    check_device_shared(
        operation, x=x, weight=weight, bias=bias, shift=shift, residual=residual, second=second
    )


@torch.library.custom_op("volcast::group_norm", mutates_args=())
def _group_norm_op(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str,
    shift: Tensor | None, second: Tensor | None,
) -> Tensor:  # fmt: skip
    form = _triton if resolve_impl("group_norm", None, x) is Impl.TRITON else _eager
    return form(x, groups, weight, bias, eps, activation, shift, None, second)[0]


@_group_norm_op.register_fake
def _group_norm_fake(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str,
    shift: Tensor | None, second: Tensor | None,
) -> Tensor:  # fmt: skip
    channels = x.shape[1] + (0 if second is None else second.shape[1])
    return empty_channels_last((x.shape[0], channels, *x.shape[2:]), x)


@torch.library.custom_op("volcast::add_group_norm", mutates_args=())
def _add_group_norm_op(
    x: Tensor, residual: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str,
    shift: Tensor | None, second: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    form = _triton if resolve_impl("add_group_norm", None, x) is Impl.TRITON else _eager
    return form(x, groups, weight, bias, eps, activation, shift, residual, second)


@_add_group_norm_op.register_fake
def _add_group_norm_fake(
    x: Tensor, residual: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str,
    shift: Tensor | None, second: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    channels = x.shape[1] + (0 if second is None else second.shape[1])
    return empty_channels_last((x.shape[0], channels, *x.shape[2:]), x), torch.empty_like(x)
