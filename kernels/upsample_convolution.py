"""Nearest x2 upsampling, then a convolution of 3 taps an axis with zero padding 1, without the upsampled tensor.

Along one axis, with taps (a, b, c) and u[2i] = u[2i + 1] = x[i]:

    y[2i]     = a x[i - 1] + (b + c) x[i]          phase 0
    y[2i + 1] = (a + b) x[i] + c x[i + 1]          phase 1

so in 3D the result is eight interleaved convolutions of 2^3 taps on the small grid: 8 multiply-adds an output voxel
and channel pair instead of 27. `phase_weights` adds the taps in float64 and rounds once; the result is exact for the
packed weights, up to the rounding of the sums.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .check import check_device_shared, check_dtype, check_parameter, check_volume, empty_channels_last
from .impl import Impl, resolve_impl

_NAME = "upsample_convolution"
# Row (phase, tap): which of (a, b, c) add up to it.
_TAPS = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


def phase_weights(weight: Tensor) -> Tensor:  # [Cout, Cin, 3, 3, 3] or [Cout, Cin, 3, 3]
    """Packed weights [8 phases, 8 taps, Cin, Cout] (2D: [4, 4, Cin, Cout]) of a convolution's; once a model.

    Phases and taps are counted with the last axis fastest; dtype and device as given. Raises ValueError for another
    shape or an integer dtype.
    """
    axes = weight.ndim - 2
    if axes not in (2, 3) or tuple(weight.shape[2:]) != (3,) * axes:
        raise ValueError(
            f"[phase_weights] weight has shape {tuple(weight.shape)}: need [Cout, Cin, 3, 3] or [Cout, Cin, 3, 3, 3]"
        )
    if not weight.is_floating_point():
        raise ValueError(f"[phase_weights] weight has dtype {weight.dtype}: need a floating-point one")
    sums = torch.tensor(_TAPS, dtype=torch.float64, device=weight.device)
    packed = weight.double()
    for _ in range(axes):  # takes the first tap axis, puts (phase, tap) last
        packed = torch.tensordot(packed, sums, dims=([2], [2]))
    cout, cin = weight.shape[:2]
    order = (*range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2), 1, 0)
    return packed.permute(order).reshape(2**axes, 2**axes, cin, cout).to(weight.dtype).contiguous()


def upsample_convolution(
    x: Tensor,  # N Cin D H W or N Cin H W, channels last
    weights: Tensor,  # [8, 8, Cin, Cout] or [4, 4, Cin, Cout], from `phase_weights`
    bias: Tensor | None,  # [Cout]
    *,
    impl: Impl | str | None = None,
) -> Tensor:  # N Cout 2D 2H 2W or N Cout 2H 2W, channels last
    """`conv(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)`, 3 taps an axis.

    dtypes float32, float16, bfloat16; bias in float32 or x's dtype; sums and bias in float32, rounded once. Raises
    ValueError for another dtype, layout or shape. The fused form takes channels in multiples of 16 bytes (8 in 16
    bits) and raises for others.
    """
    _check(x, weights, bias)
    if impl is None:
        return torch.ops.volcast.upsample_convolution(x, weights, bias)  # type: ignore[no-any-return]
    form = _triton if resolve_impl(_NAME, impl, x, weights, bias) is Impl.TRITON else _eager
    return form(x, weights, bias)


def _eager(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    axes = x.ndim - 2
    convolution = F.conv3d if axes == 3 else F.conv2d
    cin, cout = weights.shape[2:]
    y = empty_channels_last((x.shape[0], cout, *(2 * size for size in x.shape[2:])), x)
    for packed, phase in zip(weights, itertools.product((0, 1), repeat=axes), strict=True):
        # Phase 0 reads one voxel before its own, phase 1 one after; F.pad counts from the last axis.
        sides = [side for p in reversed(phase) for side in (1 - p, p)]
        taps = packed.permute(2, 1, 0).reshape(cout, cin, *(2,) * axes)
        part = convolution(F.pad(x, sides), taps, None if bias is None else bias.to(x.dtype))
        y[(slice(None), slice(None), *(slice(p, None, 2) for p in phase))] = part
    return y


def _triton(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    from .launch_triton import run
    from .upsample_convolution_triton import upsample_convolution_launches

    for name, tensor in (("x", x), ("weights", weights)):
        if tensor.data_ptr() % 16:
            raise ValueError(
                f"[{_NAME}] {name} does not begin at a multiple of 16 bytes: call .clone() on it"
            )
    y, launches = upsample_convolution_launches(x, weights, bias)
    run(launches, x.device)
    return y


def _check(x: Tensor, weights: Tensor, bias: Tensor | None) -> None:
    check_volume(_NAME, "x", x)
    phases = 2 ** (x.ndim - 2)
    if weights.ndim != 4 or tuple(weights.shape[:3]) != (phases, phases, x.shape[1]) or 0 in weights.shape:
        raise ValueError(
            f"[{_NAME}] weights have shape {tuple(weights.shape)}: need ({phases}, {phases}, {x.shape[1]}, Cout); "
            "call phase_weights on the convolution's weight"
        )
    if not weights.is_contiguous():
        raise ValueError(f"[{_NAME}] weights are not contiguous: call .contiguous() on them")
    check_dtype(_NAME, x=x, weights=weights)
    if bias is not None:
        check_parameter(_NAME, "bias", bias, (weights.shape[3],), x)
    check_device_shared(_NAME, x=x, weights=weights, bias=bias)


@torch.library.custom_op("volcast::upsample_convolution", mutates_args=())
def _upsample_convolution_op(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    form = _triton if resolve_impl(_NAME, None, x) is Impl.TRITON else _eager
    return form(x, weights, bias)


@_upsample_convolution_op.register_fake
def _upsample_convolution_fake(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    return empty_channels_last((x.shape[0], weights.shape[3], *(2 * size for size in x.shape[2:])), x)
