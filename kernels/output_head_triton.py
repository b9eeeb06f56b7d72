"""Fused output head: y = conv(activation(group_norm(x))) + bias for one or a few output channels.

As an implicit GEMM the 3^3 convolution has one useful column: tensor cores idle and every activation is fetched 27
times. So multiply first, then add: each activation is made once, in registers, and multiplied with the weights of all
taps; what is left of the convolution is to add small float32 planes, each shifted by its tap.

- Small volumes, three launches: statistics; `multiply` leaves a plane a tap and output channel; `add_planes` adds the
  27 shifted planes. Those of a sample fit in L2.
- Large volumes: `multiply_along` walks along D. The taps that differ along D only meet in the same row of the tile, so
  the accumulators add them: 9 planes are left of 27. It stops after a slab whose planes fit in L2, keeps its two
  unfinished accumulators in `carry`, and goes on from there when `add_planes` has emptied the planes. So x is read
  once, nothing is computed twice, and where the slabs end changes no bit.

Traffic: x twice (statistics, multiply) and y once; the planes, 36 bytes a voxel and output channel each way, stay in
L2. They are stored by tiles [columns, rows], so the offsets in a tile are constants. An image is a volume of height 1,
walked along its own H. Offsets: 64 bits per tile, 32 within.
"""

# Kernel arguments are blocks and constants of the kernel language, not Python types:
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import output_memory
from .configuration import configuration
from .group_norm_triton import merged, silu, statistics_launch
from .input_head_triton import neighbours
from .launch_triton import Launch, kernel


@triton.jit
def _activation(x, first_row, row, valid, channel, mean, scale, offset, C: tl.constexpr, SILU: tl.constexpr):
    """activation(group_norm(x)) of rows first_row + row [rows, channels], in x's dtype."""
    at = row[:, None] * C + channel[None, :]
    v = tl.load(x + first_row * C + at, valid[:, None] & (channel < C)[None, :], 0.0).to(tl.float32)
    if x.dtype.element_ty == tl.float32:
        # A mean far above the deviation cancels exactly here; 16 bits could not hold such an x.
        v -= mean[None, :]
    v = v * scale[None, :] + offset[None, :]
    if SILU:
        v = silu(v)
    # The channels past C meet zero weights; the rows past the volume are never stored or never added.
    return v.to(x.dtype.element_ty)


@triton.jit
def _affine(x, norm_weight, norm_bias, channel, mean, inverse, C: tl.constexpr):
    """(scale, offset) [channels], 0 past C."""
    scale = tl.load(norm_weight + channel, channel < C, 0.0).to(tl.float32) * inverse
    offset = tl.load(norm_bias + channel, channel < C, 0.0).to(tl.float32)
    if x.dtype.element_ty != tl.float32:
        offset -= mean * scale
    return scale, offset


@triton.jit
def _weights(
    weight, channel, lead, C: tl.constexpr, OUT: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The weights [channels, columns] of taps lead..lead + TAPS - 1; a column is a tap of an output channel."""
    column = tl.arange(0, COLUMNS)
    at = ((column // TAPS * C)[None, :] + channel[:, None]) * KERNEL + (lead + column % TAPS)[None, :]
    return tl.load(weight + at, (channel < C)[:, None] & (column < OUT * TAPS)[None, :], 0.0)


@kernel
def finish_statistics(
    partial,  # float32 [N, groups, 2, programs]: mean, M2
    statistics,  # float32 [N, groups, 2]: mean, 1 / sqrt(var + eps)
    rows: tl.int64,
    EPS: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PARTIAL_ROWS: tl.constexpr,
    PARTIAL_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """`multiply_along` asks for them in every slab: not each time from all programs' partials."""
    sample = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    mean, inverse = merged(partial, sample, group, rows, EPS, C, GROUP, PARTIAL_ROWS, PARTIAL_PROGRAMS)
    out = statistics + (sample * (C // GROUP) + group) * 2
    tl.store(out, mean, group < C // GROUP)
    tl.store(out + 1, inverse, group < C // GROUP)


@kernel
def multiply(
    x,  # [N, rows, C]
    partial,  # float32 [N, groups, 2, programs]
    norm_weight,  # [C]
    norm_bias,  # [C]
    weight,  # [OUT, C, KERNEL]
    planes,  # float32 [samples, tiles, OUT * KERNEL, ROWS]
    first_sample: tl.int64, rows: tl.int64,
    EPS: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PARTIAL_ROWS: tl.constexpr,
    PARTIAL_PROGRAMS: tl.constexpr, OUT: tl.constexpr, KERNEL: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Each tap's product with samples first_sample + 0, 1, ..."""
    tile, mine = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    sample = first_sample + mine
    means, inverses = merged(
        partial, sample, tl.arange(0, GROUPS), rows, EPS, C, GROUP, PARTIAL_ROWS, PARTIAL_PROGRAMS
    )
    row = tl.arange(0, ROWS)
    valid = row < rows - tile * ROWS
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, C, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        group = tl.minimum(channel, C - 1) // GROUP
        mean, inverse = tl.gather(means, group, 0), tl.gather(inverses, group, 0)
        scale, offset = _affine(x, norm_weight, norm_bias, channel, mean, inverse, C)
        a = _activation(x, sample * rows + tile * ROWS, row, valid, channel, mean, scale, offset, C, SILU)
        b = _weights(weight, channel, 0, C, OUT, KERNEL, KERNEL, COLUMNS)
        products = tl.dot(a, b, products, input_precision="ieee")
    column = tl.arange(0, COLUMNS)
    out = planes + (mine * tl.cdiv(rows, ROWS) + tile) * (OUT * KERNEL * ROWS)
    tl.store(out + column[None, :] * ROWS + row[:, None], products, (column < OUT * KERNEL)[None, :])


@triton.jit
def _block(
    x, statistics, norm_weight, norm_bias, weight, sample, channel, C: tl.constexpr, GROUP: tl.constexpr,
    OUT: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(mean, scale, offset, the weights of the three taps along D) of a block of channels."""
    known = statistics + (sample * (C // GROUP) + channel // GROUP) * 2
    mean = tl.load(known, channel < C, 0.0)
    inverse = tl.load(known + 1, channel < C, 0.0)
    scale, offset = _affine(x, norm_weight, norm_bias, channel, mean, inverse, C)
    b0 = _weights(weight, channel, 0, C, OUT, 3 * TAPS, TAPS, COLUMNS)
    b1 = _weights(weight, channel, TAPS, C, OUT, 3 * TAPS, TAPS, COLUMNS)
    b2 = _weights(weight, channel, 2 * TAPS, C, OUT, 3 * TAPS, TAPS, COLUMNS)
    return mean, scale, offset, b0, b1, b2


@kernel
def multiply_along(
    x,  # [N, depth, plane, C]
    statistics,  # float32 [N, groups, 2]
    norm_weight,  # [C]
    norm_bias,  # [C]
    weight,  # [OUT, C, 3, TAPS]
    planes,  # float32 [last - first, tiles, OUT * TAPS, ROWS]
    carry,  # float32 [tiles, 2, OUT * TAPS, ROWS]
    sample: tl.int64, depth: tl.int64, plane: tl.int64, first: tl.int64, last: tl.int64,
    C: tl.constexpr, GROUP: tl.constexpr, OUT: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Planes first..last - 1 of a sample, summed over the taps along D. The launch before ended at first."""
    tile = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    valid = row < plane - tile * ROWS
    size: tl.constexpr = OUT * TAPS * ROWS
    column = tl.arange(0, COLUMNS)
    at = column[None, :] * ROWS + row[:, None]
    # Of plane d - 1 the taps of d - 2 and d - 1 are in, of plane d those of d - 1.
    begun = (column < tl.where(first > 0, OUT * TAPS, 0))[None, :]
    below = tl.load(carry + tile * (2 * size) + at, begun, 0.0)
    here = tl.load(carry + tile * (2 * size) + size + at, begun, 0.0)
    out = planes + tile * size
    step = tl.cdiv(plane, ROWS) * size
    channel = tl.arange(0, BLOCK)
    if C <= BLOCK:
        mean, scale, offset, b0, b1, b2 = _block(x, statistics, norm_weight, norm_bias, weight, sample, channel,
                                                 C, GROUP, OUT, TAPS, COLUMNS)  # fmt: skip
    for d in range(tl.where(first > 0, first + 1, 0), tl.minimum(last + 1, depth)):
        above = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, C, BLOCK):
            if C > BLOCK:
                channel = start + tl.arange(0, BLOCK)
                mean, scale, offset, b0, b1, b2 = _block(x, statistics, norm_weight, norm_bias, weight, sample, channel,
                                                         C, GROUP, OUT, TAPS, COLUMNS)  # fmt: skip
            first_row = (sample * depth + d) * plane + tile * ROWS
            a = _activation(x, first_row, row, valid, channel, mean, scale, offset, C, SILU)
            below = tl.dot(a, b2, below, input_precision="ieee")
            here = tl.dot(a, b1, here, input_precision="ieee")
            above = tl.dot(a, b0, above, input_precision="ieee")
        done = (column < tl.where(d > 0, OUT * TAPS, 0))[None, :]
        tl.store(out + (d - 1 - first) * step + at, below, done)
        below = here
        here = above
    # Beyond the last plane lies only padding.
    ended = (column < tl.where(last == depth, OUT * TAPS, 0))[None, :]
    tl.store(out + (depth - 1 - first) * step + at, below, ended)
    left = (column < tl.where(last < depth, OUT * TAPS, 0))[None, :]
    tl.store(carry + tile * (2 * size) + at, below, left)
    tl.store(carry + tile * (2 * size) + size + at, here, left)


@kernel
def add_planes(
    planes,  # float32 [sheets, tiles, OUT * DEPTH_TAPS * HEIGHT_TAPS * 3, ROWS]
    bias,  # [OUT]
    y,  # [N * D * H * W, OUT]; the sheets begin at first_row
    first_row: tl.int64, depth: tl.int32, height: tl.int32, width: tl.int32,
    OUT: tl.constexpr, OUT_PADDED: tl.constexpr, DEPTH_TAPS: tl.constexpr, HEIGHT_TAPS: tl.constexpr,
    ROWS: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """y[v] = bias + sum over taps of plane[tap][v + tap], nothing from outside. A sheet has depth * height * width
    voxels: those of a plane (then one tap along D is left) or of a sample."""
    taps: tl.constexpr = DEPTH_TAPS * HEIGHT_TAPS * 3
    sheet = tl.program_id(1).to(tl.int64)
    voxels = depth * height * width
    first = tl.program_id(0) * VOXELS
    i = tl.arange(0, VOXELS)
    inside = neighbours(first + i, i < voxels - first, depth, height, width, DEPTH_TAPS, HEIGHT_TAPS)
    channel = tl.arange(0, OUT_PADDED)
    real = (channel < OUT)[:, None] & (i < voxels - first)[None, :]
    source = planes + sheet * ((voxels - 1) // ROWS + 1) * (OUT * taps * ROWS)
    total = tl.zeros((OUT_PADDED, VOXELS), tl.float32)
    for tap in tl.static_range(taps):
        lines = (
            (tap // 3 // HEIGHT_TAPS - DEPTH_TAPS // 2) * height + tap // 3 % HEIGHT_TAPS - HEIGHT_TAPS // 2
        )
        near = first + i + (lines * width + tap % 3 - 1)
        row = near & (ROWS - 1)
        at = (near - row).to(tl.int64) * (OUT * taps) + row
        there = (channel < OUT)[:, None] & ((inside >> tap) & 1 != 0)[None, :]
        total += tl.load(source + at[None, :] + ((channel * taps + tap) * ROWS)[:, None], there, 0.0)
    total += tl.load(bias + channel, channel < OUT, 0.0).to(tl.float32)[:, None]
    out = y + (first_row + sheet * voxels + first) * OUT
    tl.store(out + i[None, :] * OUT + channel[:, None], total.to(y.dtype.element_ty), real)


def output_head_launches(
    x: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float,
    activation: str, *, out: Tensor | None = None,
) -> tuple[Tensor, list[Launch]]:  # fmt: skip
    """(y, launches) for inputs that `output_head.py` has checked; y goes to `out`, channels last, or to new memory."""
    n, c, *spatial = x.shape
    outputs, taps, rows = weight.shape[0], 3 ** len(spatial), torch.Size(spatial).numel()
    y = output_memory("output_head", "out", out, (n, outputs, *spatial), x)
    statistics, partial = statistics_launch(x, groups, configuration("group_norm_split", x.dtype, rows * c))
    made = statistics.constants
    sources = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight}
    norm = {"C": c, "GROUP": c // groups}
    merging = {"EPS": eps, "PARTIAL_ROWS": made["ROWS"], "PARTIAL_PROGRAMS": made["PROGRAMS"]}
    product: dict[str, float] = {**norm, "SILU": activation == "silu"}
    settings = configuration("output_head_multiply", x.dtype, outputs * taps)
    samples = settings["scratch"] // (4 * outputs * taps * rows)
    if samples:
        product |= {**merging, "GROUPS": triton.next_power_of_2(groups)}
        return y, [statistics, *_at_once(samples, sources, partial, bias, y, product, settings)]
    known = torch.empty((n, groups, 2), dtype=torch.float32, device=x.device)
    block = min(8, triton.next_power_of_2(groups))
    finish = Launch(
        kernel=finish_statistics,
        grid=(triton.cdiv(groups, block), n, 1),
        arguments={"partial": partial, "statistics": known, "rows": rows},
        constants={**merging, **norm, "GROUPS": block},
    )
    return y, [statistics, finish, *_in_slabs(sources, known, bias, y, product)]


def _at_once(
    samples: int, sources: dict[str, Tensor], partial: Tensor, bias: Tensor, y: Tensor, constants: dict[str, float],
    settings: dict[str, int],
) -> list[Launch]:  # fmt: skip
    """All taps of `samples` samples at a time."""
    n, out, *spatial = y.shape
    rows, taps = torch.Size(spatial).numel(), 3 ** len(spatial)
    shape = _tile(sources["x"].shape[1], out * taps, rows, settings)
    tiles = triton.cdiv(rows, shape["ROWS"])
    planes = y.new_empty((min(samples, n), tiles, out * taps, shape["ROWS"]), dtype=torch.float32)
    launches = []
    for first in range(0, n, samples):
        many = min(samples, n - first)
        launches += [
            Launch(
                kernel=multiply,
                grid=(tiles, many, 1),
                arguments={**sources, "partial": partial, "planes": planes, "first_sample": first, "rows": rows},
                constants={**constants, **shape, "OUT": out, "KERNEL": taps},
                warps=settings["warps"],
                stages=settings["stages"],
            ),
            _add(planes, bias, y, first * rows, many, spatial, 3),
        ]  # fmt: skip
    return launches


def _in_slabs(
    sources: dict[str, Tensor], statistics: Tensor, bias: Tensor, y: Tensor, constants: dict[str, float]
) -> list[Launch]:
    """Sample by sample along D, as many planes at a time as the scratch memory holds."""
    n, out, depth, *rest = y.shape
    plane, taps = torch.Size(rest).numel(), 3 ** len(rest)
    c = sources["x"].shape[1]
    settings = configuration("output_head_multiply_along", y.dtype, _pad(out * taps) * _pad(c))
    shape = _tile(c, out * taps, plane, settings)
    tiles = triton.cdiv(plane, shape["ROWS"])
    most = max(1, settings["scratch"] // (4 * out * taps * shape["ROWS"] * tiles))
    most = min(most, 65535)  # a grid's second axis
    slab = triton.cdiv(depth, triton.cdiv(depth, most))  # of equal depth
    planes = y.new_empty((slab, tiles, out * taps, shape["ROWS"]), dtype=torch.float32)
    carry = y.new_empty((tiles, 2, out * taps, shape["ROWS"]), dtype=torch.float32)
    launches = []
    for sample in range(n):
        for first in range(0, depth, slab):
            last = min(first + slab, depth)
            launches += [
                Launch(
                    kernel=multiply_along,
                    grid=(tiles, 1, 1),
                    arguments={**sources, "statistics": statistics, "planes": planes, "carry": carry,
                               "sample": sample, "depth": depth, "plane": plane, "first": first, "last": last},
                    constants={**constants, **shape, "OUT": out, "TAPS": taps},
                    warps=settings["warps"],
                    stages=settings["stages"],
                ),
                _add(planes, bias, y, (sample * depth + first) * plane, last - first, [1, *rest], 1),
            ]  # fmt: skip
    return launches


def _pad(size: int) -> int:
    """Tensor cores take no side below 16."""
    return max(16, int(triton.next_power_of_2(size)))


def _tile(c: int, columns: int, rows: int, settings: dict[str, int]) -> dict[str, int]:
    """Constants of a product [ROWS, BLOCK] x [BLOCK, COLUMNS]."""
    return {
        "COLUMNS": _pad(columns),
        "BLOCK": min(settings["channels"], _pad(c)),
        "ROWS": min(settings["rows"], _pad(rows)),
    }


def _add(
    planes: Tensor, bias: Tensor, y: Tensor, first_row: int, sheets: int, sheet: list[int], depth_taps: int
) -> Launch:
    """What makes `sheets` times `sheet` voxels of y from its row `first_row` on."""
    depth, *rest = sheet
    height, width = rest if len(rest) == 2 else (1, *rest)
    out = triton.next_power_of_2(y.shape[1])
    settings = configuration("output_head_add", y.dtype, out)
    voxels = max(32, settings["elements"] // out)
    return Launch(
        kernel=add_planes,
        grid=(triton.cdiv(depth * height * width, voxels), sheets, 1),
        arguments={"planes": planes, "bias": bias, "y": y, "first_row": first_row, "depth": depth, "height": height,
                   "width": width},
        constants={
            "OUT": y.shape[1], "OUT_PADDED": out, "DEPTH_TAPS": depth_taps,
            "HEIGHT_TAPS": 3 if len(rest) == 2 else 1, "ROWS": planes.shape[-1], "VOXELS": voxels,
        },
        warps=settings["warps"],
    )  # fmt: skip
