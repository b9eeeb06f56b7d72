"""Fused nearest x2 + 3-tap convolution: an implicit matrix product for each phase of the result, stored in place.

    y[n, 2d + p_d, 2h + p_h, 2w + p_w, o] =
        bias[o] + sum over taps t in {0, 1}^3, channels c of weights[p, t, c, o] x[n, d + p_d + t_d - 1, ..., c]

A program takes a box of voxels of the small grid, a block of output channels, and one phase or several; the sum runs
over (tap, block of input channels). Work: 128 Cin Cout FLOPs a small voxel in 3D (8 phases of 8 taps), 32 in 2D: 8/27
and 4/9 of the convolution of the upsampled tensor. Device memory: x, the weights and y once; the upsampled tensor, 8
times x, is neither written nor read. Next to the tensor cores L2 bounds the speed, from which every box is read once a
phase and tap: hence large tiles, and the phases of a box next to each other in the launch order.

From 9.0 on boxes are read through a 5-D tensor descriptor (TMA): coordinates out of range, -1 among them, read as
zero, which is the padding. The product is then taken as (weights^T)(box^T), because a second operand may be a reshaped
view of shared memory, and a first one goes through registers. Older devices read boxes by pointer and mask.
Offsets: 64 bits a voxel, 32 within. Sums in float32 in a fixed order: the same input gives the same bits.
"""

# Kernel arguments are blocks and constants of the kernel language, not Python types:
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import output_memory
from .configuration import configuration
from .launch_triton import Launch, kernel


@triton.jit
def _block(program, W, H, D, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
           BW: tl.constexpr):  # fmt: skip
    """(sample, first d, h, w, block of channels, group of phases); the phases run fastest."""
    group = program % GROUPS
    column = program // GROUPS % COLUMNS
    box = program // (GROUPS * COLUMNS)
    w = box % tl.cdiv(W, BW)
    box = box // tl.cdiv(W, BW)
    h = box % tl.cdiv(H, BH)
    box = box // tl.cdiv(H, BH)
    return box // tl.cdiv(D, BD), box % tl.cdiv(D, BD) * BD, h * BH, w * BW, column, group


@kernel
def upsample_convolution(
    x,  # [N, D, H, W, CIN]; images have D = 1
    weights,  # [2^AXES phases, 2^AXES taps, CIN, COUT]
    bias,  # [COUT], or None
    y,  # [N, D or 2D, 2H, 2W, COUT]
    N: tl.int32, D: tl.int32, H: tl.int32, W: tl.int32,
    CIN: tl.constexpr, COUT: tl.constexpr, AXES: tl.constexpr, PHASES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = 1 << AXES
    VOXELS: tl.constexpr = BD * BH * BW
    BLOCKS: tl.constexpr = (CIN + BK - 1) // BK
    n, d, h, w, column, group = _block(
        tl.program_id(0), W, H, D, (COUT + BN - 1) // BN, TAPS // PHASES, BD, BH, BW
    )
    output = column * BN + tl.arange(0, BN)
    voxel = tl.arange(0, VOXELS)
    vd, vh, vw = d + voxel // (BH * BW), h + voxel // BW % BH, w + voxel % BW
    row = W.to(tl.int64) * CIN
    # Past the last channel of a tap a block holds weights of the next one; x is zero there.
    packed = tl.make_tensor_descriptor(weights, [TAPS * TAPS * CIN, COUT], [COUT, 1], [BK, BN])
    if DESCRIPTORS:
        boxes = tl.make_tensor_descriptor(
            x, [N, D, H, W, CIN], [D * (H * row), H * row, row, CIN, 1], [1, BD, BH, BW, BK]
        )
    else:
        channel = tl.arange(0, BK)
        here = ((n.to(tl.int64) * D + vd) * H + vh) * W + vw
        here = x + here[:, None] * CIN + channel[None, :]
    # Several phases become one loop with the steps: the next phase's loads are under way while this one is stored.
    for turn in tl.range(0, PHASES, flatten=PHASES > 1):
        phase = group * PHASES + turn
        # The transpose has the channels first.
        total = tl.zeros((BN, VOXELS) if DESCRIPTORS else (VOXELS, BN), tl.float32)
        for step in range(TAPS * BLOCKS):
            tap = step // BLOCKS
            k = step % BLOCKS * BK
            td = (phase >> 2) + (tap >> 2) - 1 if AXES == 3 else 0
            th = (phase >> 1 & 1) + (tap >> 1 & 1) - 1
            tw = (phase & 1) + (tap & 1) - 1
            taps = packed.load([(phase * TAPS + tap) * CIN + k, column * BN])
            if DESCRIPTORS:
                box = tl.reshape(boxes.load([n, d + td, h + th, w + tw, k]), (VOXELS, BK))
                total = tl.dot(taps.T, box.T, total, input_precision="ieee")
            else:
                inside = (vd + td >= 0) & (vd + td < D) & (vh + th >= 0) & (vh + th < H)
                inside = inside & (vw + tw >= 0) & (vw + tw < W)
                there = here + (((td * H + th).to(tl.int64) * W + tw) * CIN + k)
                box = tl.load(there, inside[:, None] & (channel < CIN - k)[None, :], 0.0)
                total = tl.dot(box, taps, total, input_precision="ieee")
        total = total.T if DESCRIPTORS else total
        if bias is not None:
            total += tl.load(bias + output, output < COUT, 0.0).to(tl.float32)[None, :]
        large = n.to(tl.int64) * (D * (AXES - 1)) + vd * (AXES - 1) + (phase >> 2)
        large = (large * (2 * H) + 2 * vh + (phase >> 1 & 1)) * (2 * W) + 2 * vw + (phase & 1)
        real = (vd < D) & (vh < H) & (vw < W)
        tl.store(
            y + large[:, None] * COUT + output[None, :],
            total.to(y.dtype.element_ty),
            real[:, None] & (output < COUT)[None, :],
        )


def upsample_convolution_launches(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    capability: int | None = None,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, list[Launch]]:
    """(y, launches) for inputs that `upsample_convolution.py` has checked.

    `capability` (90 for 9.0) picks how boxes are read and how large tiles are; by default that of x's device, and 9.0
    where x is not on a GPU. y goes to `out`, channels last, or to new memory. Raises ValueError for channels that are not a multiple of 16 bytes.
    """
    axes = x.ndim - 2
    n, cin, *spatial = x.shape
    cout = weights.shape[3]
    for name, channels in (("Cin", cin), ("Cout", cout)):
        if channels * x.itemsize % 16:
            raise ValueError(
                f"[upsample_convolution] {name}={channels}: the fused form needs a multiple of {16 // x.itemsize} "
                "in this dtype; pad the weights with zeros or pass impl='eager'"
            )
    capability = capability or _capability(x.device)
    d, h, w = (1,) * (3 - axes) + tuple(spatial)
    y = output_memory("upsample_convolution", "out", out, (n, cout, *(2 * size for size in spatial)), x)
    # 9.0 and 10.x have 227 KiB of shared memory a block, and matrix units that read it directly.
    wide = "_wide" if capability // 10 in (9, 10) else ""
    settings = configuration(f"upsample_convolution{wide}", x.dtype, n * d * h * w * cout)
    shape = box_of(settings["voxels"], d, h, w)
    block = min(settings["channels"], max(64, triton.next_power_of_2(cout)))
    phases = min(settings["phases"], 2**axes)
    boxes = n * triton.cdiv(d, shape[0]) * triton.cdiv(h, shape[1]) * triton.cdiv(w, shape[2])
    launch = Launch(
        kernel=upsample_convolution,
        grid=(boxes * triton.cdiv(cout, block) * (2**axes // phases), 1, 1),
        arguments={"x": x, "weights": weights, "bias": bias, "y": y, "N": n, "D": d, "H": h, "W": w},
        constants={
            "CIN": cin, "COUT": cout, "AXES": axes, "PHASES": phases, "DESCRIPTORS": capability >= 90,
            "BD": shape[0], "BH": shape[1], "BW": shape[2],
            "BK": min(settings["depth"], max(16, triton.next_power_of_2(cin))), "BN": block,
        },
        warps=settings["warps"],
        stages=settings["stages"],
    )  # fmt: skip
    return y, [launch]


def box_of(voxels: int, d: int, h: int, w: int) -> tuple[int, int, int]:
    """The box of `voxels` (all powers of two) that covers the grid with the fewest boxes, then the least halo."""
    sizes = [2**power for power in range(voxels.bit_length())]
    boxes = [box for box in itertools.product(sizes, repeat=3) if box[0] * box[1] * box[2] == voxels]

    def cost(box: tuple[int, ...]) -> tuple[int, int]:
        count = triton.cdiv(d, box[0]) * triton.cdiv(h, box[1]) * triton.cdiv(w, box[2])
        return count, (box[0] + 1) * (box[1] + 1) * (box[2] + 1)

    return min(boxes, key=cost)


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
