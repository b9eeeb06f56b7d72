"""Attention without a mask (arXiv:1706.03762), self or cross: softmax(q k^T * scale) v, one head at a time.

Scores, softmax and sums are float32 whatever the inputs are: float16's range cannot hold the scores of a real network.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .check import check_device_shared, check_dtype, check_shape
from .configuration import configuration
from .impl import Impl, resolve_impl

WIDEST = 768


def attention(
    q: Tensor,  # N H L D
    k: Tensor,  # N H M D
    v: Tensor,  # N H M D
    *,
    scale: float | None = None,  # 1 / sqrt(D) if None
    impl: Impl | str | None = None,
) -> Tensor:  # N H L D, in memory N L H D
    """Each query's mean of the values, weighted by softmax over the keys. `F.scaled_dot_product_attention`'s meaning.

    dtypes float32, float16, bfloat16; D a multiple of 8 up to 768; any strides but the last, so views of `[N, L, H, D]`
    are read where they lie, and the result flattens to tokens `[N, L, H * D]` without a copy. With impl=None on a GPU
    the heads that `configurations.json` lists under `attention_hand_over` go to PyTorch's own kernels.

    Inputs are finite: a key of infinities makes the fused form return NaN where softmax would leave it out.

    Raises ValueError for another dtype, shape or device, a last axis that is not contiguous, a scale that is not
    positive and finite.
    """
    _check(q, k, v, scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if impl is None:
        return torch.ops.volcast.attention(q, k, v, factor)  # type: ignore[no-any-return]
    form = _triton if resolve_impl("attention", impl, q, k, v) is Impl.TRITON else _eager
    return form(q, k, v, factor)


def check_width(width: int) -> None:
    """Raise ValueError for a head that the fused kernels do not take."""
    if width % 8 or not 8 <= width <= WIDEST:
        raise ValueError(f"[attention] heads of {width}: need a multiple of 8 up to {WIDEST}")


def check_output(out: Tensor, q: Tensor) -> None:
    """Raise ValueError for memory that the fused kernels cannot write the result for `q` to."""
    check_shape("attention", "out", out, tuple(q.shape))
    check_dtype("attention", q=q, out=out)
    check_device_shared("attention", q=q, out=out)
    _check_rows("out", out)


def _check_rows(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1:
        raise ValueError(
            f"[attention] {name} has strides {x.stride()}: the last axis must be contiguous; call .contiguous()"
        )


def _eager(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    weight = torch.softmax(torch.matmul(q.float(), k.float().mT) * scale, -1)
    return _as_tokens(torch.matmul(weight, v.float()).to(q.dtype))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _as_tokens(F.scaled_dot_product_attention(q, k, v, scale=scale))


def _triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from .attention_triton import attention_launches
    from .launch_triton import run

    out, launches = attention_launches(q, k, v, scale)
    run(launches, q.device)
    return out


def _as_tokens(x: Tensor) -> Tensor:
    """`N H L D` that lies in memory as `N L H D`; copies only if it does not yet."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"[attention] {name} has shape {tuple(x.shape)}: need N H L D without empty axes"
            )
    n, heads, _, width = q.shape
    check_width(width)
    check_shape("attention", "k", k, (n, heads, k.shape[2], width))
    check_shape("attention", "v", v, tuple(k.shape))
    check_dtype("attention", q=q, k=k, v=v)
    check_device_shared("attention", q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rows(name, x)
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"[attention] scale={scale}: need a positive, finite number")


@torch.library.custom_op("volcast::attention", mutates_args=())
def _attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if resolve_impl("attention", None, q) is Impl.EAGER:
        return _eager(q, k, v, scale)
    hand_over = configuration("attention_hand_over", q.dtype, q.shape[-1])["sdpa"]
    return (_sdpa if hand_over else _triton)(q, k, v, scale)


@_attention_op.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    n, heads, length, width = q.shape
    return q.new_empty((n, length, heads, width)).transpose(1, 2)
