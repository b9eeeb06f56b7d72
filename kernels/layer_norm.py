"""LayerNorm (arXiv:1607.06450) over the channels of tokens, with the sum before it: shift, residual.

    h = x + shift[n, c] + residual
    y = (h - mean) / sqrt(var + eps) * weight + bias

mean and var (biased) are of one token. float16 and bfloat16 inputs have their sums and statistics in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .check import check_device_shared, check_dtype, check_parameter, check_shape, check_shift
from .impl import Impl, resolve_impl

WIDEST = 4096


def layer_norm(
    x: Tensor,  # N L C, contiguous
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    *,
    eps: float = 1e-5,
    impl: Impl | str | None = None,
) -> Tensor:  # N L C
    """`torch.nn.LayerNorm` over the last axis, up to 4096 channels.

    dtypes float32, float16, bfloat16; weight and bias in float32 or x's dtype. Raises ValueError for another dtype,
    layout or shape, for eps outside (0, 1).
    """
    _check("layer_norm", x, weight, bias, eps, None, None)
    if impl is None:
        return torch.ops.volcast.layer_norm(x, weight, bias, eps)  # type: ignore[no-any-return]
    form = _triton if resolve_impl("layer_norm", impl, x, weight, bias) is Impl.TRITON else _eager
    return form(x, weight, bias, eps, None, None)[0]


def add_layer_norm(
    x: Tensor,  # N L C, contiguous
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    *,
    eps: float = 1e-5,
    shift: Tensor | None = None,  # [N, C] or [C]: the bias of the product before; any stride along N
    residual: Tensor | None = None,  # as x
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor]:
    """`(y, h)`: the sum h = x + shift + residual is written once, for the next residual; y is `layer_norm` of it.

    Takes and raises what `layer_norm` does; one of shift and residual at least.
    """
    _check("add_layer_norm", x, weight, bias, eps, shift, residual)
    if shift is None and residual is None:
        raise ValueError("[add_layer_norm] shift=None, residual=None: need one of them, or call layer_norm")
    if impl is None:
        y, h = torch.ops.volcast.add_layer_norm(x, weight, bias, eps, shift, residual)
        return y, h
    chosen = resolve_impl("add_layer_norm", impl, x, weight, bias, shift, residual)
    return (_triton if chosen is Impl.TRITON else _eager)(x, weight, bias, eps, shift, residual)


def check_width(operation: str, channels: int) -> None:
    """Raise ValueError for more channels than a program has registers for."""
    if channels > WIDEST:
        raise ValueError(f"[{operation}] {channels} channels: need at most {WIDEST}")


def _eager(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    h = x if shift is None else x + shift.to(x.dtype).reshape(-1, 1, x.shape[2])
    h = h if residual is None else h + residual
    return F.layer_norm(h, (x.shape[2],), weight.to(x.dtype), bias.to(x.dtype), eps), h


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    from .launch_triton import run
    from .layer_norm_triton import layer_norm_launches

    y, h, launches = layer_norm_launches(x, weight, bias, eps, shift, residual)
    run(launches, x.device)
    return y, h


def _check(
    operation: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float,
    shift: Tensor | None, residual: Tensor | None,
) -> None:  # fmt: skip
    for name, tokens in (("x", x), ("residual", residual)):
        if tokens is None:
            continue
        if tokens.ndim != 3 or 0 in tokens.shape:
            raise ValueError(
                f"[{operation}] {name} has shape {tuple(tokens.shape)}: need N L C without empty axes"
            )
        if not tokens.is_contiguous():
            raise ValueError(f"[{operation}] {name} has strides {tokens.stride()}: call .contiguous() on it")
        check_shape(operation, name, tokens, tuple(x.shape))
    n, _, channels = x.shape
    check_width(operation, channels)
    check_dtype(operation, x=x, residual=residual)
    check_parameter(operation, "weight", weight, (channels,), x)
    check_parameter(operation, "bias", bias, (channels,), x)
    if shift is not None:
        if shift.ndim == 1:
            check_parameter(operation, "shift", shift, (channels,), x)
        else:
            check_shift(operation, shift, (n, channels), x)
    if not 0 < eps < 1:
        raise ValueError(f"[{operation}] eps={eps}: need a number between 0 and 1")
    check_device_shared(operation, x=x, weight=weight, bias=bias, shift=shift, residual=residual)


@torch.library.custom_op("volcast::layer_norm", mutates_args=())
def _layer_norm_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    form = _triton if resolve_impl("layer_norm", None, x) is Impl.TRITON else _eager
    return form(x, weight, bias, eps, None, None)[0]


@_layer_norm_op.register_fake
def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("volcast::add_layer_norm", mutates_args=())
def _add_layer_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    form = _triton if resolve_impl("add_layer_norm", None, x) is Impl.TRITON else _eager
    return form(x, weight, bias, eps, shift, residual)


@_add_layer_norm_op.register_fake
def _add_layer_norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)
