"""Fused GroupNorm over channels-last volumes: h = x + shift + residual, v = cat(h, second), y = act(norm(v)).

Traffic: aten reads for the statistics, reads and writes the norm, reads and writes the activation: 10 bytes an element
in 16 bits, with one program a group, which on NDHWC uses 2 to 32 bytes of each row. Here every program reads whole
rows of channels, so all multiprocessors work, and v is read twice and y written once: 6 bytes.

- split, two launches: `partial_statistics` leaves (mean, M2) per group and program; `normalize` merges them (Chan et
  al. 1979: each program again, from L2, so no third launch) and applies. With a residual the first writes h, the
  second reads it.
- single, one launch: one program per sample and few groups reads its groups twice, the second time from L1 or L2.

Statistics are Welford's in float32 per position of the tile, so neither a large mean nor float16's range hurts.
Offsets: 64 bits per tile, 32 within; `rows` is not specialised, so another size of volume compiles nothing new. The
order of every sum is fixed: the same input gives the same bits.
"""

# Kernel arguments are blocks and constants of the kernel language, not Python types:
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import output_memory, sample_stride
from .configuration import configuration
from .launch_triton import Launch, kernel


@triton.jit
def _columns(block, C: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr):
    """(channel, is one) of each column [GROUPS * PADDED] of a block of groups, each padded to a power of two."""
    column = tl.arange(0, GROUPS * PADDED)
    if GROUP == PADDED:
        channel = block * (GROUPS * PADDED) + column
        return channel, channel < C
    else:
        start = (block * GROUPS + column // PADDED) * GROUP
        channel = start + column % PADDED
        return channel, (column % PADDED < GROUP) & (start < C)


@triton.jit
def _load(
    x, residual, second, shift, first_row, row, valid, channel, real, C1: tl.constexpr, C2: tl.constexpr
):
    """Rows first_row + row of v in float32 [rows, columns]; `shift` is per column. The border of the concat may lie
    anywhere: masked-off loads cost nothing."""
    mine = valid[:, None] & (real & (channel < C1))[None, :]
    at = row[:, None] * C1 + channel[None, :]
    v = tl.load(x + first_row * C1 + at, mine, 0.0).to(tl.float32) + shift[None, :]
    if residual is not None:
        v += tl.load(residual + first_row * C1 + at, mine, 0.0).to(tl.float32)
    if C2 > 0:
        its = valid[:, None] & (real & (channel >= C1))[None, :]
        at = row[:, None] * C2 + (channel - C1)[None, :]
        v += tl.load(second + first_row * C2 + at, its, 0.0).to(tl.float32)
    return v


@triton.jit
def _shift(shift, sample, channel, real, C1: tl.constexpr, SHIFT_STRIDE: tl.constexpr):
    if shift is None:
        return tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(shift + sample * SHIFT_STRIDE + channel, real & (channel < C1), 0.0).to(tl.float32)


@triton.jit
def _store_sum(h, v, first_row, row, valid, channel, real, C1: tl.constexpr):
    if h is not None:
        mine = valid[:, None] & (real & (channel < C1))[None, :]
        at = row[:, None] * C1 + channel[None, :]
        tl.store(h + first_row * C1 + at, v.to(h.dtype.element_ty), mine)


@triton.jit
def _statistics(
    x, residual, second, h, shift, sample, first, last, channel, real,
    C1: tl.constexpr, C2: tl.constexpr, rows,
    GROUP: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(mean, M2) [GROUPS] of rows first..last - 1 of a sample; writes h on the way."""
    row = tl.arange(0, ROWS)
    mean = tl.zeros((ROWS, GROUPS * PADDED), tl.float32)
    m2 = tl.zeros((ROWS, GROUPS * PADDED), tl.float32)
    seen = 0.0
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        valid = row < last - start
        base = sample * rows + start
        v = _load(x, residual, second, shift, base, row, valid, channel, real, C1, C2)
        _store_sum(h, v, base, row, valid, channel, real, C1)
        seen += 1.0
        delta = v - mean
        mean = tl.where(valid[:, None], mean + delta / seen, mean)
        m2 = tl.where(valid[:, None], m2 + delta * (v - mean), m2)
    # How often each row of the tile was valid, then Chan's merge over rows and channels of a group. The columns that
    # pad a group saw zeros only: their m2 is 0.
    count = tl.maximum((last - first - row + ROWS - 1) // ROWS, 0).to(tl.float32)
    weight = count[:, None] * real.to(tl.float32)[None, :]
    total = tl.maximum((last - first).to(tl.float32) * GROUP, 1.0)
    group_mean = _group_sum(mean * weight, GROUPS, PADDED) / total
    far = mean - _spread(group_mean, GROUPS, PADDED)[None, :]
    return group_mean, _group_sum(m2 + weight * far * far, GROUPS, PADDED)


@triton.jit
def _group_sum(v, GROUPS: tl.constexpr, PADDED: tl.constexpr):
    return tl.sum(tl.reshape(tl.sum(v, 0), (GROUPS, PADDED)), 1)


@triton.jit
def _spread(per_group, GROUPS: tl.constexpr, PADDED: tl.constexpr):
    return tl.reshape(tl.broadcast_to(per_group[:, None], (GROUPS, PADDED)), (GROUPS * PADDED,))


@triton.jit
def silu(v):
    """v / (1 + exp(-v)). A root needs no guard for large numbers as a division does: 2 instructions an element less
    on sm_80 and sm_90, 2 to 6 on sm_100."""
    root = tl.rsqrt(1.0 + tl.exp2(v * -1.4426950408889634))
    return v * root * root


@triton.jit
def _apply(
    x, residual, second, shift, y, weight, bias, mean, inverse, sample, first, last, channel, real,
    C1: tl.constexpr, C2: tl.constexpr, rows, SILU: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    scale = tl.load(weight + channel, real, 0.0).to(tl.float32) * inverse
    offset = tl.load(bias + channel, real, 0.0).to(tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        valid = row < last - start
        base = sample * rows + start
        v = _load(x, residual, second, shift, base, row, valid, channel, real, C1, C2)
        # (v - mean) * scale, not v * scale - mean * scale: a large mean would cancel.
        v = (v - mean[None, :]) * scale[None, :] + offset[None, :]
        if SILU:
            v = silu(v)
        at = row[:, None] * (C1 + C2) + channel[None, :]
        tl.store(y + base * (C1 + C2) + at, v.to(y.dtype.element_ty), valid[:, None] & real[None, :])


@kernel
def partial_statistics(
    x,  # [N, rows, C1]
    residual,  # as x, or None
    second,  # [N, rows, C2], or None
    shift,  # [N, C1], rows SHIFT_STRIDE apart, or None
    h,  # as x, or None
    partial,  # float32 [N, groups, 2, programs]: mean, M2
    rows: tl.int64,
    C1: tl.constexpr, C2: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, SHIFT_STRIDE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    program, block, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    span = tl.cdiv(tl.cdiv(rows, PROGRAMS), ROWS) * ROWS
    first = tl.minimum(program * span, rows)
    last = tl.minimum(first + span, rows)
    channel, real = _columns(block, C1 + C2, GROUP, PADDED, GROUPS)
    bump = _shift(shift, sample, channel, real, C1, SHIFT_STRIDE)
    mean, m2 = _statistics(x, residual, second, h, bump, sample, first, last, channel, real, C1, C2, rows,
                           GROUP, PADDED, GROUPS, ROWS, STAGES)  # fmt: skip
    group = block * GROUPS + tl.arange(0, GROUPS)
    total: tl.constexpr = (C1 + C2) // GROUP
    out = partial + (sample * total + group) * (2 * PROGRAMS) + program
    tl.store(out, mean, group < total)
    tl.store(out + PROGRAMS, m2, group < total)


@kernel
def normalize(
    x,  # [N, rows, C1]; what partial_statistics read, or the h that it wrote
    second,  # [N, rows, C2], or None
    shift,  # [N, C1], rows SHIFT_STRIDE apart, or None
    y,  # [N, rows, C1 + C2]
    weight,  # [C1 + C2]
    bias,  # [C1 + C2]
    partial,  # float32 [N, groups, 2, programs]
    rows: tl.int64,
    EPS: tl.constexpr, SILU: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, SHIFT_STRIDE: tl.constexpr, PROGRAMS: tl.constexpr,
    PARTIAL_ROWS: tl.constexpr, PARTIAL_PROGRAMS: tl.constexpr,
):  # fmt: skip
    program, block, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = block * GROUPS + tl.arange(0, GROUPS)
    mean, inverse = merged(partial, sample, group, rows, EPS, C1 + C2, GROUP, PARTIAL_ROWS, PARTIAL_PROGRAMS)
    span = tl.cdiv(tl.cdiv(rows, PROGRAMS), ROWS) * ROWS
    first = tl.minimum(program * span, rows)
    last = tl.minimum(first + span, rows)
    channel, real = _columns(block, C1 + C2, GROUP, PADDED, GROUPS)
    bump = _shift(shift, sample, channel, real, C1, SHIFT_STRIDE)
    _apply(x, None, second, bump, y, weight, bias, _spread(mean, GROUPS, PADDED), _spread(inverse, GROUPS, PADDED),
           sample, first, last, channel, real, C1, C2, rows, SILU, ROWS, STAGES)  # fmt: skip


@triton.jit
def merged(
    partial, sample, group, rows, EPS: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """(mean, 1 / sqrt(var + eps)) [groups] from what PROGRAMS programs of `partial_statistics` left."""
    total: tl.constexpr = C // GROUP
    program = tl.arange(0, triton.next_power_of_2(PROGRAMS))
    span = tl.cdiv(tl.cdiv(rows, PROGRAMS), ROWS) * ROWS
    count = tl.minimum(tl.maximum(rows - program * span, 0), span).to(tl.float32)[None, :] * GROUP
    at = partial + (sample * total + group)[:, None] * (2 * PROGRAMS) + program[None, :]
    there = (group < total)[:, None] & (program < PROGRAMS)[None, :]
    means = tl.load(at, there, 0.0)
    m2s = tl.load(at + PROGRAMS, there, 0.0)
    elements = rows.to(tl.float32) * GROUP
    count = tl.where(program < PROGRAMS, count, 0.0)
    mean = tl.sum(means * count, 1) / elements
    far = means - mean[:, None]
    variance = tl.sum(m2s + count * far * far, 1) / elements
    return mean, 1.0 / tl.sqrt(variance + EPS)


@kernel
def single_group_norm(
    x,  # [N, rows, C1]
    residual,  # as x, or None
    second,  # [N, rows, C2], or None
    shift,  # [N, C1], rows SHIFT_STRIDE apart, or None
    h,  # as x, or None
    y,  # [N, rows, C1 + C2]
    weight,  # [C1 + C2]
    bias,  # [C1 + C2]
    rows: tl.int64,
    EPS: tl.constexpr, SILU: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, SHIFT_STRIDE: tl.constexpr,
):  # fmt: skip
    block, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = rows * 0
    channel, real = _columns(block, C1 + C2, GROUP, PADDED, GROUPS)
    bump = _shift(shift, sample, channel, real, C1, SHIFT_STRIDE)
    mean, m2 = _statistics(x, residual, second, h, bump, sample, first, rows, channel, real, C1, C2, rows,
                           GROUP, PADDED, GROUPS, ROWS, STAGES)  # fmt: skip
    inverse = 1.0 / tl.sqrt(m2 / (rows.to(tl.float32) * GROUP) + EPS)
    _apply(x, residual, second, bump, y, weight, bias, _spread(mean, GROUPS, PADDED),
           _spread(inverse, GROUPS, PADDED), sample, first, rows, channel, real, C1, C2, rows, SILU, ROWS, STAGES)  # fmt: skip


def group_norm_launches(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str,
    shift: Tensor | None, residual: Tensor | None, second: Tensor | None,
    *, out: Tensor | None = None, sum_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Launch]]:  # fmt: skip
    """(y, h, launches) for inputs that `group_norm.py` has checked; h is x where there is no residual.

    shift may also be `[C]` or `[1, C]`. y goes to `out`, which may be x or the residual where nothing is concatenated, h
    to `sum_out`, other memory than both. None is new memory, but with `out` alone a sum is kept only where the launches
    need it themselves.
    """
    n, c1, *spatial = x.shape
    c2 = 0 if second is None else second.shape[1]
    rows = torch.Size(spatial).numel()
    group = (c1 + c2) // groups
    single = configuration("group_norm_single", x.dtype, rows * group)
    alone = rows * group <= single["group_elements"]
    y = output_memory("group_norm", "out", out, (n, c1 + c2, *spatial), x)
    h = None
    if residual is not None and not (alone and out is not None and sum_out is None):
        h = output_memory("group_norm", "sum_out", sum_out, tuple(x.shape), x)
    sources = {"x": x, "residual": residual, "second": second, "shift": shift, "h": h}
    affine = {"y": y, "weight": weight, "bias": bias}
    norm = {"EPS": eps, "SILU": activation == "silu"}
    if alone:
        groups_a_block = max(1, single["row_bytes"] // (group * x.itemsize))
        shape = _tile(c1, c2, groups, groups_a_block, single, rows)
        launch = Launch(
            kernel=single_group_norm,
            grid=(triton.cdiv(groups, shape["GROUPS"]), n, 1),
            arguments={**sources, **affine, "rows": rows},
            constants={**norm, **shape, "SHIFT_STRIDE": sample_stride(shift, n)},
            warps=single["warps"],
        )
        return y, x if h is None else h, [launch]
    split = configuration("group_norm_split", x.dtype, rows * (c1 + c2))
    first, partial = statistics_launch(x, groups, split, shift, residual, second, h)
    blocks = first.grid[1]
    programs = max(1, split["apply_programs"] // blocks)
    last = Launch(
        kernel=normalize,
        grid=(programs, blocks, n),
        arguments={
            "x": x if h is None else h, "second": second, "shift": shift if h is None else None,
            **affine, "partial": partial, "rows": rows,
        },
        constants={
            **norm, **first.constants, "PROGRAMS": programs,
            "PARTIAL_ROWS": first.constants["ROWS"], "PARTIAL_PROGRAMS": first.constants["PROGRAMS"],
        },
        warps=split["warps"],
    )  # fmt: skip
    return y, x if h is None else h, [first, last]


def statistics_launch(
    x: Tensor, groups: int, settings: dict[str, int], shift: Tensor | None = None, residual: Tensor | None = None,
    second: Tensor | None = None, h: Tensor | None = None,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """The launch that leaves `partial` [N, groups, 2, programs], and `partial`. `merged` needs its ROWS and PROGRAMS."""
    n, c1, *spatial = x.shape
    c2 = 0 if second is None else second.shape[1]
    rows = torch.Size(spatial).numel()
    groups_a_block = max(1, settings["columns"] // ((c1 + c2) // groups))
    shape = _tile(c1, c2, groups, groups_a_block, settings, rows)
    blocks = triton.cdiv(groups, shape["GROUPS"])
    # Blocks of channels share the programs of a sample: each then has more rows, and fewer to merge.
    programs = max(1, settings["programs"] // blocks)
    partial = torch.empty((n, groups, 2, programs), dtype=torch.float32, device=x.device)
    launch = Launch(
        kernel=partial_statistics,
        grid=(programs, blocks, n),
        arguments={"x": x, "residual": residual, "second": second, "shift": shift, "h": h, "partial": partial,
                   "rows": rows},
        constants={**shape, "SHIFT_STRIDE": sample_stride(shift, n), "PROGRAMS": programs},
        warps=settings["warps"],
    )  # fmt: skip
    return launch, partial


def _tile(
    c1: int, c2: int, groups: int, groups_a_block: int, settings: dict[str, int], rows: int
) -> dict[str, int]:
    """Constants of a tile [ROWS, GROUPS * PADDED] of about `settings["tile"]` elements."""
    group = (c1 + c2) // groups
    padded = triton.next_power_of_2(group)
    block = triton.next_power_of_2(min(groups_a_block, groups))
    height = max(1, min(settings["tile"] // (block * padded), triton.next_power_of_2(rows)))
    return {"C1": c1, "C2": c2, "GROUP": group, "PADDED": padded, "GROUPS": block, "ROWS": height,
            "STAGES": settings["stages"]}  # fmt: skip
