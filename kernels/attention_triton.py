"""Fused attention, heads up to 128: flash attention (arXiv:2205.14135, 2307.08691), forward, without a mask.

    m = max(m, max_j s_j),  p_j = exp2(s_j - m),  l = l 2^(m' - m) + sum_j p_j,  acc = acc 2^(m' - m) + sum_j p_j v_j
    out = acc / l,  with s = q k^T * scale * log2(e); m' is the m before

for block after block of keys, so that no score leaves the registers. Traffic: q and out once, k and v once per block of
queries, from L2. A head of 32 has 128 multiply-adds of the tensor cores per exponential: the special function unit is
the limit, and each score is one multiply-add, one exponential, one maximum, one sum and half a conversion.

The incomplete block of keys comes first. So only it pays for a mask; and the loop over the full blocks, which may be
empty, ends in the store: were a product to follow it, the assembler would make Hopper's products wait for each other.
Offsets: 64 bits. Wider heads: `attention_wide_triton.py`.
"""

# Kernel arguments are blocks and constants of the kernel language, not Python types:
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention import check_output, check_width
from .attention_wide_triton import LOG2E, stride_unit, strides, wide_launches
from .configuration import configuration
from .launch_triton import Launch, kernel

WIDEST_FLASH = 128


@triton.jit
def _add_keys(
    q, k_at, v_at, scale, left, highest, total, acc,
    D: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(m, l, acc) after KEYS more keys, of which `left` are there if the block is not WHOLE."""
    key, column = tl.arange(0, KEYS), tl.arange(0, PADDED)
    there = (key < left)[:, None] & (column < D)[None, :]
    if not WHOLE:
        k = tl.load(k_at, there, 0.0)
    elif D < PADDED:
        k = tl.load(k_at, (column < D)[None, :], 0.0)
    else:
        k = tl.load(k_at)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if not WHOLE:
        scores = tl.where((key < left)[None, :], scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1) * scale)
    weight = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(highest - higher)
    total = total * shrink + tl.sum(weight, 1)
    acc = acc * shrink[:, None]
    if not WHOLE:
        v = tl.load(v_at, there, 0.0)
    elif D < PADDED:
        v = tl.load(v_at, (column < D)[None, :], 0.0)
    else:
        v = tl.load(v_at)
    return higher, total, tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")


@kernel
def flash_attention(
    q,  # N H L D, any strides
    k,  # N H M D, any strides
    v,  # N H M D, any strides
    out,  # N H L D, any strides
    L: tl.int32, M: tl.int32,
    q_n: tl.int64, q_h: tl.int64, q_l: tl.int64,  # strides in units of UNIT elements
    k_n: tl.int64, k_h: tl.int64, k_l: tl.int64,
    v_n: tl.int64, v_h: tl.int64, v_l: tl.int64,
    out_n: tl.int64, out_h: tl.int64, out_l: tl.int64,
    scale: tl.float32,  # times log2(e)
    D: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * QUERIES
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, key, column = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, PADDED)
    mine = (row < L - first)[:, None] & (column < D)[None, :]
    q_at = (
        q
        + (sample * q_n + head * q_h + first * q_l) * UNIT
        + row[:, None] * (q_l.to(tl.int64) * UNIT)
        + column[None, :]
    )
    k_step, v_step = k_l.to(tl.int64) * UNIT, v_l.to(tl.int64) * UNIT  # the interpreter ignores annotations
    k_at = k + (sample * k_n + head * k_h) * UNIT + key[:, None] * k_step + column[None, :]
    v_at = v + (sample * v_n + head * v_h) * UNIT + key[:, None] * v_step + column[None, :]
    queries = tl.load(q_at, mine, 0.0)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, PADDED), tl.float32)
    whole = (M - 1) // KEYS
    last = whole * KEYS
    highest, total, acc = _add_keys(
        queries, k_at + last * k_step, v_at + last * v_step, scale, M - last, highest, total, acc,
        D, PADDED, KEYS, False,
    )  # fmt: skip
    for _ in range(whole):
        highest, total, acc = _add_keys(
            queries, k_at, v_at, scale, KEYS, highest, total, acc, D, PADDED, KEYS, True
        )
        k_at += k_step * KEYS
        v_at += v_step * KEYS
    at = (
        out
        + (sample * out_n + head * out_h + first * out_l) * UNIT
        + row[:, None] * (out_l.to(tl.int64) * UNIT)
        + column[None, :]
    )
    tl.store(at, (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty), mine)


def attention_launches(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, out: Tensor | None = None
) -> tuple[Tensor, list[Launch]]:
    """(out, launches) for inputs that `attention.py` has checked; raises ValueError for heads of a wrong width.

    `out`: `N H L D`, any strides but the last, none of the inputs; None: new memory, `N L H D`.
    """
    n, heads, length, width = q.shape
    check_width(width)
    if out is None:
        out = q.new_empty((n, length, heads, width)).transpose(1, 2)
    else:
        check_output(out, q)
    if width > WIDEST_FLASH:
        return out, wide_launches(q, k, v, out, scale)
    padded = max(16, triton.next_power_of_2(width))
    settings = configuration("attention", q.dtype, padded)
    unit = stride_unit(q, k, v, out)
    launch = Launch(
        kernel=flash_attention,
        grid=(triton.cdiv(length, settings["queries"]), heads, n),
        arguments={
            "q": q, "k": k, "v": v, "out": out, "L": length, "M": k.shape[2],
            **strides(unit, q=q, k=k, v=v, out=out), "scale": scale * LOG2E,
        },
        constants={
            "D": width, "PADDED": padded, "UNIT": unit,
            "QUERIES": settings["queries"], "KEYS": settings["keys"],
        },
        warps=settings["warps"],
        stages=settings["stages"],
    )  # fmt: skip
    return out, [launch]
