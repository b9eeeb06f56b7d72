"""Counter-based normals: Philox 4x32-10 (Salmon et al., SC'11) and Box-Muller, the streams of csrc/noise.hpp.

Normal number i of (seed, sample, step) comes from counter (i / 4, step, sample low, sample high) under key = seed, so
it depends neither on the batch nor on the device. log, sin and cos are FreeBSD msun's (e_log.c, k_sin.c, k_cos.c) for
the arguments that occur, written out in additions, multiplications, a division and a square root. IEEE 754 fixes the
bits of each, so `philox_triton.py`, which does the same in the same order, has the same bits on every device; here the
square root is PyTorch's, on a CPU up to 1 ulp off. csrc takes its C library's functions: `standard_normal` says what
that means.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

TWO_PI = 2 * math.pi
SQRT_HALF_BITS = 0x3FE6A09E00000000  # just below sqrt(1/2), as a float64
LN2 = (float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33"))  # 32 bits, the rest
# pi / 2 in parts of 33, 33 and 53 bits: small integers times the first two are exact.
HALF_PI = tuple(map(float.fromhex, ("0x1.921fb544p+0", "0x1.0b4611a6p-34", "0x1.3198a2e037073p-69")))
# Coefficients and order of evaluation of log, sin and cos: Copyright (C) 1993 by Sun Microsystems, Inc. All rights
# reserved. Developed at SunSoft, a Sun Microsystems, Inc. business. Permission to use, copy, modify, and distribute
# this software is freely granted, provided that this notice is preserved.
LOG = (0.6666666666666735130, 0.3999999999940941908, 0.2857142874366239149, 0.2222219843214978396,
       0.1818357216161805012, 0.1531383769920937332, 0.1479819860511658591)  # fmt: skip
SIN = (-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
       2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10)  # fmt: skip
COS = (4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
       -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11)  # fmt: skip


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Four 32-bit numbers per counter; all tensors int64 with values below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return [c0, c1, c2, c3]


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of a * b, in halves: int64 would overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | (low & 0xFFFF)


def standard_normal(seeds: Tensor, samples: Tensor, step: int, count: int) -> Tensor:
    """Normals 0..count - 1 of each (seed, sample, step), float64 [N, count]; seeds, samples: uint64's bits, int64 [N].

    Two float64 results d ulp apart round to different float32 values if a tie of float32 lies between them: at a rate
    of d / 2^29. Against csrc with glibc the mean d is 0.08: one value in 7e9, by one ulp of float32.
    """
    block = torch.arange(-(-count // 4), device=seeds.device)
    low, high = (samples & MASK)[:, None], (samples >> 32 & MASK)[:, None]
    number = torch.full_like(low, step)
    counter = [part.broadcast_to(len(seeds), len(block)) for part in (block[None], number, low, high)]
    bits = philox(counter, [(seeds & MASK)[:, None], (seeds >> 32 & MASK)[:, None]])
    four = (*_box_muller(bits[0], bits[1]), *_box_muller(bits[2], bits[3]))
    return torch.stack(four, -1).flatten(1)[:, :count]


def _box_muller(r0: Tensor, r1: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * _log((r0.double() + 0.5) * 2.0**-32))
    cos, sin = _cos_sin(r1)
    return radius * cos, radius * sin


def _log(u: Tensor) -> Tensor:
    """u = 2^k (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); log(1 + f) is a series in s = f / (2 + f)."""
    bits = u.view(torch.int64)
    exponent = (bits - SQRT_HALF_BITS) >> 52
    k = exponent.double()
    f = (bits - (exponent << 52)).view(torch.float64) - 1.0
    s = f / (f + 2.0)
    z = s * s
    w = z * z
    odd = z * (LOG[0] + w * (LOG[2] + w * (LOG[4] + w * LOG[6])))
    even = w * (LOG[1] + w * (LOG[3] + w * LOG[5]))
    half = 0.5 * f * f
    return k * LN2[0] - ((half - (s * (half + (even + odd)) + k * LN2[1])) - f)


def _cos_sin(turn: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the float64 2 pi (turn + 1/2) / 2^32. Its quarter is exact in integers, and as it stays 7e-10
    away from multiples of pi / 2, three parts of pi / 2 leave the remainder x + y exact to 2^-80."""
    angle = TWO_PI * ((turn.double() + 0.5) * 2.0**-32)
    quarter = (turn + (1 << 29)) >> 30
    n = quarter.double()
    first = angle - n * HALF_PI[0]
    second = first - n * HALF_PI[1]
    rest = n * HALF_PI[2] - ((first - second) - n * HALF_PI[1])
    x = second - rest
    y = (second - x) - rest
    z = x * x
    w = z * z
    r = SIN[1] + z * (SIN[2] + z * (SIN[3] + z * (SIN[4] + z * SIN[5])))
    v = z * x
    sin = x - ((z * (0.5 * y - v * r) - y) - v * SIN[0])
    r = z * (COS[0] + z * (COS[1] + z * COS[2])) + w * w * (COS[3] + z * (COS[4] + z * COS[5]))
    half = 0.5 * z
    top = 1.0 - half
    cos = top + (((1.0 - top) - half) + (z * r - x * y))
    swap = (quarter & 1) == 1
    cos, sin = torch.where(swap, sin, cos), torch.where(swap, cos, sin)
    cos = torch.where(((quarter + 1) & 2) == 2, -cos, cos)
    return cos, torch.where((quarter & 2) == 2, -sin, sin)
