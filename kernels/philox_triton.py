"""The normals of `philox.py` in the Triton language: the same operations in the same order, so the same bits.

Compile with multiply-add fusion off (`Launch(fuse_multiply_add=False)`). One Philox block gives four normals, cos and
sin share one reduction, and there is no slow path for large arguments, which libdevice's need: 172 additions and
multiplications in float64 a block, two divisions and two square roots.
"""

# Arguments are blocks of the kernel language, not Python types:
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from . import philox

_TWO_PI = tl.constexpr(philox.TWO_PI)
_SQRT_HALF_BITS = tl.constexpr(philox.SQRT_HALF_BITS)
_LN2 = tl.constexpr(philox.LN2)
_HALF_PI = tl.constexpr(philox.HALF_PI)
_LOG = tl.constexpr(philox.LOG)
_SIN = tl.constexpr(philox.SIN)
_COS = tl.constexpr(philox.COS)


@triton.jit
def philox_bits(seed, sample, step, block):
    """Four uint32 blocks; seed and sample int64, block any integers."""
    low = sample.to(tl.uint32)
    high = (sample >> 32).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), step.to(tl.uint32), low, high)


@triton.jit
def four_normals(seed, sample, step, block):
    """Normals 4 * block .. 4 * block + 3 of the stream, rounded to float32."""
    r0, r1, r2, r3 = philox_bits(seed, sample, step, block)
    n0, n1 = box_muller(r0, r1)
    n2, n3 = box_muller(r2, r3)
    return n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32), n3.to(tl.float32)


@triton.jit
def box_muller(r0, r1):
    # tl.sqrt is correctly rounded in float64, on a GPU too.
    radius = tl.sqrt(-2.0 * _log((r0.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
    cos, sin = _cos_sin(r1)
    return radius * cos, radius * sin


@triton.jit
def _log(u):
    bits = u.to(tl.int64, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 52
    k = exponent.to(tl.float64)
    f = (bits - (exponent << 52)).to(tl.float64, bitcast=True) - 1.0
    s = f / (f + 2.0)
    z = s * s
    w = z * z
    odd = z * (_LOG[0] + w * (_LOG[2] + w * (_LOG[4] + w * _LOG[6])))
    even = w * (_LOG[1] + w * (_LOG[3] + w * _LOG[5]))
    half = 0.5 * f * f
    return k * _LN2[0] - ((half - (s * (half + (even + odd)) + k * _LN2[1])) - f)


@triton.jit
def _cos_sin(turn):
    angle = _TWO_PI * ((turn.to(tl.float64) + 0.5) * 2.3283064365386963e-10)
    quarter = (turn >> 30) + ((turn >> 29) & 1)  # 0..4; turn + 2^29 could overflow
    n = quarter.to(tl.float64)
    first = angle - n * _HALF_PI[0]
    second = first - n * _HALF_PI[1]
    rest = n * _HALF_PI[2] - ((first - second) - n * _HALF_PI[1])
    x = second - rest
    y = (second - x) - rest
    z = x * x
    w = z * z
    r = _SIN[1] + z * (_SIN[2] + z * (_SIN[3] + z * (_SIN[4] + z * _SIN[5])))
    v = z * x
    sin = x - ((z * (0.5 * y - v * r) - y) - v * _SIN[0])
    r = z * (_COS[0] + z * (_COS[1] + z * _COS[2])) + w * w * (_COS[3] + z * (_COS[4] + z * _COS[5]))
    half = 0.5 * z
    top = 1.0 - half
    cos = top + (((1.0 - top) - half) + (z * r - x * y))
    swap = (quarter & 1) == 1
    c = tl.where(swap, sin, cos)
    s = tl.where(swap, cos, sin)
    c = tl.where(((quarter + 1) & 2) == 2, -c, c)
    return c, tl.where((quarter & 2) == 2, -s, s)
