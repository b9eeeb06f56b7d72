"""Fused input head: y = conv(x) + bias for one or a few input channels.

Traffic: y is written once and dwarfs x, whose neighbours come from the caches. A product [voxels, taps * Cin] x
[taps * Cin, C] on tensor cores, its left side gathered: taps and channels are padded to powers of two apart, so a
column's tap and channel are bits of its number, and a voxel's 27 neighbours are told apart from padding by one word of
27 bits. The weights stay with a program, which takes every so-many-th tile of voxels.

An image is a volume of height 1: its own H takes the place of D. Offsets: 64 bits per tile, 32 within.
"""

# Kernel arguments are blocks and constants of the kernel language, not Python types:
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .check import output_memory
from .configuration import configuration
from .launch_triton import Launch, kernel


@triton.jit
def _both_ways(bits, place, size, SHIFT: tl.constexpr):
    """`bits` once for each neighbour along an axis, before, here and behind, without those outside."""
    before = tl.where(place > 0, bits, 0)
    behind = tl.where(place < size - 1, bits, 0)
    return before | (bits << SHIFT) | (behind << (2 * SHIFT))


@triton.jit
def neighbours(v, valid, depth, height, width, DEPTH_TAPS: tl.constexpr, HEIGHT_TAPS: tl.constexpr):
    """Bit `tap` is set where voxel v + tap lies inside; taps count with W fastest, along each axis 1 or 3."""
    line = v // width
    d = line // height
    bits = _both_ways(valid.to(tl.int32), v - line * width, width, 1)
    if HEIGHT_TAPS == 3:
        bits = _both_ways(bits, line - d * height, height, 3)
    if DEPTH_TAPS == 3:
        bits = _both_ways(bits, d, depth, 3 * HEIGHT_TAPS)
    return bits


@kernel
def input_head(
    x,  # [N, depth, height, width, IN]
    weight,  # [C, IN, 3 * HEIGHT_TAPS * 3]
    bias,  # [C]
    y,  # [N, depth, height, width, C]
    depth: tl.int32, height: tl.int32, width: tl.int32,
    IN: tl.constexpr, IN_PADDED: tl.constexpr, C: tl.constexpr, HEIGHT_TAPS: tl.constexpr,
    TAPS_PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    voxels = depth * height * width
    column = tl.arange(0, TAPS_PADDED * IN_PADDED)
    tap, source = column % TAPS_PADDED, column // TAPS_PADDED
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    taps: tl.constexpr = 9 * HEIGHT_TAPS
    # The axis that neighbouring threads should walk is last: a channel's weights here, the voxels of a tap below.
    known = (channel < C)[:, None] & ((tap < taps) & (source < IN))[None, :]
    b = tl.load(weight + (channel * (IN * taps))[:, None] + (source * taps + tap)[None, :], known, 0.0).T
    offset = tl.load(bias + channel, channel < C, 0.0).to(tl.float32)
    lines = (tap // (3 * HEIGHT_TAPS) - 1) * height + tap // 3 % HEIGHT_TAPS - HEIGHT_TAPS // 2
    reach = (lines.to(tl.int64) * width + tap % 3 - 1) * IN + source
    i = tl.arange(0, ROWS)
    for tile in range(tl.program_id(0), (voxels - 1) // ROWS + 1, tl.num_programs(0)):
        first = tile * ROWS
        valid = i < voxels - first
        inside = neighbours(first + i, valid, depth, height, width, 3, HEIGHT_TAPS)
        there = ((inside[None, :] >> tap[:, None]) & 1 != 0) & (source < IN)[:, None]
        row = sample * voxels + first
        a = tl.load(x + row * IN + reach[:, None] + (i * IN)[None, :], there, 0.0)
        sums = tl.dot(a.T, b, input_precision="ieee") + offset[None, :]
        at = i[:, None] * C + channel[None, :]
        tl.store(y + row * C + at, sums.to(y.dtype.element_ty), valid[:, None] & (channel < C)[None, :])


def input_head_launches(
    x: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None
) -> tuple[Tensor, list[Launch]]:
    """(y, launches) for inputs that `input_head.py` has checked; y goes to `out`, channels last, or to new memory."""
    n, inputs, *spatial = x.shape
    c = weight.shape[0]
    depth, height, width = spatial if len(spatial) == 3 else (spatial[0], 1, spatial[1])
    y = output_memory("input_head", "out", out, (n, c, *spatial), x)
    columns = triton.next_power_of_2(inputs) * triton.next_power_of_2(3 ** len(spatial))
    settings = configuration("input_head", x.dtype, columns)
    block = max(16, min(settings["channels"], triton.next_power_of_2(c)))
    blocks, tiles = triton.cdiv(c, block), triton.cdiv(depth * height * width, settings["rows"])
    launch = Launch(
        kernel=input_head,
        grid=(min(max(1, settings["programs"] // blocks), tiles), blocks, n),
        arguments={"x": x, "weight": weight, "bias": bias, "y": y, "depth": depth, "height": height, "width": width},
        constants={
            "IN": inputs, "IN_PADDED": triton.next_power_of_2(inputs), "C": c, "HEIGHT_TAPS": 2 * len(spatial) - 3,
            "TAPS_PADDED": triton.next_power_of_2(3 ** len(spatial)), "BLOCK": block, "ROWS": settings["rows"],
        },
        warps=settings["warps"],
        stages=settings["stages"],
    )  # fmt: skip
    return y, [launch]
