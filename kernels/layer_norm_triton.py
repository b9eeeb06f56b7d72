"""Fused LayerNorm: a row of channels, or several, stays in the registers of one program.

Traffic: each input once, y and the sum once. The statistics take two passes over registers, the mean and then the
squares around it, so a mean far above the deviation does not cancel. Offsets: 64 bits a tile, 32 within.
"""

# Kernel arguments are blocks and constants of the kernel language, not Python types:
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .check import output_memory, sample_stride
from .configuration import configuration
from .launch_triton import Launch, kernel
from .layer_norm import check_width


@kernel
def row_norm(
    x,  # [N, rows, C]
    residual,  # as x, or None
    shift,  # [N, C], or None
    h,  # as x, or None
    y,  # as x
    weight,  # [C]
    bias,  # [C]
    rows: tl.int64,
    SHIFT_STRIDE: tl.constexpr,  # from sample to sample
    EPS: tl.constexpr, C: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first, sample = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    row, channel = tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = channel < C
    there = (row < rows - first)[:, None] & real[None, :]
    base = (sample * rows + first) * C
    at = row[:, None] * C + channel[None, :]
    v = tl.load(x + base + at, there, 0.0).to(tl.float32)
    if shift is not None:
        v += tl.load(shift + sample * SHIFT_STRIDE + channel, real, 0.0).to(tl.float32)[None, :]
    if residual is not None:
        v += tl.load(residual + base + at, there, 0.0).to(tl.float32)
    if h is not None:
        tl.store(h + base + at, v.to(h.dtype.element_ty), there)
    mean = tl.sum(v, 1) / C
    far = tl.where(real[None, :], v - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(far * far, 1) / C + EPS)
    scale = tl.load(weight + channel, real, 0.0).to(tl.float32)
    offset = tl.load(bias + channel, real, 0.0).to(tl.float32)
    out = far * inverse[:, None] * scale[None, :] + offset[None, :]
    tl.store(y + base + at, out.to(y.dtype.element_ty), there)


def layer_norm_launches(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None, residual: Tensor | None,
    *, out: Tensor | None = None, sum_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Launch]]:  # fmt: skip
    """(y, h, launches) for inputs that `layer_norm.py` has checked; h is x where nothing is added.

    y goes to `out`, h to `sum_out`: contiguous, as x, and each may be x or the residual itself. None is new memory, but
    with `out` alone no sum is kept. Raises ValueError for too many channels.
    """
    n, length, channels = x.shape
    check_width("layer_norm", channels)
    h = None
    if (shift is not None or residual is not None) and (out is None or sum_out is not None):
        h = output_memory("layer_norm", "sum_out", sum_out, tuple(x.shape), x)
    y = output_memory("layer_norm", "out", out, tuple(x.shape), x)
    stride = sample_stride(shift, n)
    if stride == 0:
        n, length = 1, n * length
    padded = triton.next_power_of_2(channels)
    settings = configuration("layer_norm", x.dtype, padded)
    height = max(1, min(settings["tile"] // padded, triton.next_power_of_2(length)))
    launch = Launch(
        kernel=row_norm,
        grid=(triton.cdiv(length, height), n, 1),
        arguments={"x": x, "residual": residual, "shift": shift, "h": h, "y": y, "weight": weight, "bias": bias,
                   "rows": length},
        constants={"SHIFT_STRIDE": stride, "EPS": eps, "C": channels, "PADDED": padded, "ROWS": height},
        warps=settings["warps"],
    )  # fmt: skip
    return y, x if h is None else h, [launch]
