"""Fused attention for wide heads, above 128 and up to 768: two matrix products with the softmax cut in between.

A head of 512 does not fit flash attention: its accumulator alone fills the registers, and 1,400 tokens are 11 blocks of
queries for 132 multiprocessors. So split over the keys, and let the split's result be the weights, not the output:

1. `score_tiles`: one program a tile of queries and keys. s = q k^T over all of D, then with the tile's own row maximum
       p = exp(s - max),  rounded to v's dtype      max and the row's sum of p in float32
2. `weigh_values`: one program a block of queries and of value columns goes through the tiles of its rows and merges
       out = sum_t exp(max_t - max) p_t v_t / sum_t exp(max_t - max) sum_t

Traffic for 512 x 1,400: partial outputs of six splits in float32 would be 17 MB each way and the scores be computed
twice (two value chunks); p is 3.9 MB, written once and read once per value chunk, all in L2. Longer inputs go in strips
of queries, so p never takes more than the table's `scratch` bytes (or one tile of queries). Where a strip ends changes
no bit of any row, and neither does anything else in the batch. Offsets: 64 bits.
"""

# Kernel arguments are blocks and constants of the kernel language, not Python types:
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch_triton import Launch, kernel

LOG2E = 1.4426950408889634


@kernel
def score_tiles(
    q,  # N H L D, any strides
    k,  # N H M D, any strides
    weights,  # [N, H, tiles, L, KEYS], v's dtype
    peaks,  # float32 [N, H, tiles, L]: row maximum of a tile's scores, times log2(e)
    masses,  # float32 [N, H, tiles, L]: row sum of a tile's weights
    L: tl.int32, M: tl.int32, tiles: tl.int32,
    q_n: tl.int64, q_h: tl.int64, q_l: tl.int64,  # strides in units of UNIT elements
    k_n: tl.int64, k_h: tl.int64, k_l: tl.int64,
    scale: tl.float32,  # times log2(e)
    D: tl.constexpr, UNIT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0) % tiles
    first = (tl.program_id(0) // tiles).to(tl.int64) * QUERIES
    start = tile.to(tl.int64) * KEYS
    row, key, part = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, DEPTH)
    queries, keys = row < L - first, key < M - start
    q_at = (
        q
        + (sample * q_n + head * q_h + first * q_l) * UNIT
        + row[:, None] * (q_l.to(tl.int64) * UNIT)
        + part[None, :]
    )
    k_at = (
        k
        + (sample * k_n + head * k_h + start * k_l) * UNIT
        + key[:, None] * (k_l.to(tl.int64) * UNIT)
        + part[None, :]
    )
    scores = tl.zeros((QUERIES, KEYS), tl.float32)
    for done in range(0, D, DEPTH):
        if D % DEPTH == 0:
            a = tl.load(q_at, queries[:, None], 0.0)
            b = tl.load(k_at, keys[:, None], 0.0)
        else:
            real = (part < D - done)[None, :]
            a = tl.load(q_at, queries[:, None] & real, 0.0)
            b = tl.load(k_at, keys[:, None] & real, 0.0)
        scores = tl.dot(a, tl.trans(b), scores, input_precision="ieee")
        q_at += DEPTH
        k_at += DEPTH
    scores = tl.where(keys[None, :], scores, float("-inf"))
    peak = tl.max(scores, 1) * scale
    weight = tl.exp2(scores * scale - peak[:, None])
    line = ((sample * tl.num_programs(1) + head) * tiles + tile) * L + first
    tl.store(peaks + line + row, peak, queries)
    tl.store(masses + line + row, tl.sum(weight, 1), queries)
    at = weights + line * KEYS + row[:, None] * KEYS + key[None, :]
    tl.store(at, weight.to(weights.dtype.element_ty), queries[:, None])


@kernel
def weigh_values(
    weights,  # [N, H, tiles, L, KEYS]
    peaks,  # float32 [N, H, tiles, L]
    masses,  # float32 [N, H, tiles, L]
    v,  # N H M D, any strides
    out,  # N H L D, any strides
    L: tl.int32, M: tl.int32, tiles: tl.int32,
    v_n: tl.int64, v_h: tl.int64, v_l: tl.int64,  # strides in units of UNIT elements
    out_n: tl.int64, out_h: tl.int64, out_l: tl.int64,
    D: tl.constexpr, UNIT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (D + VALUES - 1) // VALUES
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = (tl.program_id(0) // chunks).to(tl.int64) * QUERIES
    row, key = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    column = tl.program_id(0) % chunks * VALUES + tl.arange(0, VALUES)
    queries, real = row < L - first, (column < D)[None, :]
    line = (sample * tl.num_programs(1) + head) * tiles * L + first
    weight_at = weights + line * KEYS + row[:, None] * KEYS + key[None, :]
    peaks += line
    masses += line
    v_step = v_l.to(tl.int64) * UNIT  # the interpreter ignores annotations
    v_at = v + (sample * v_n + head * v_h) * UNIT + key[:, None] * v_step + column[None, :]
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, VALUES), tl.float32)
    for left in range(M, 0, -KEYS):
        # Before the product, so that they arrive while it runs.
        peak = tl.load(peaks + row, queries, 0.0)
        mass = tl.load(masses + row, queries, 1.0)
        weight = tl.load(weight_at, queries[:, None], 0.0)
        values = tl.load(v_at, (key < left)[:, None] & real, 0.0)
        higher = tl.maximum(highest, peak)
        shrink, share = tl.exp2(highest - higher), tl.exp2(peak - higher)
        total = total * shrink + mass * share
        mine = tl.dot(weight, values, input_precision="ieee")
        acc = acc * shrink[:, None] + mine * share[:, None]
        highest = higher
        peaks += L
        masses += L
        weight_at += L.to(tl.int64) * KEYS
        v_at += v_step * KEYS
    at = (
        out
        + (sample * out_n + head * out_h + first * out_l) * UNIT
        + row[:, None] * (out_l.to(tl.int64) * UNIT)
        + column[None, :]
    )
    tl.store(at, (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty), queries[:, None] & real)


def wide_launches(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> list[Launch]:
    """The launches that fill `out`, `N H L D`: two for each strip of queries."""
    n, heads, length, width = q.shape
    keys = k.shape[2]
    settings = configuration("attention_wide", q.dtype, length * keys)
    tiles = triton.cdiv(keys, settings["keys"])
    row_bytes = n * heads * tiles * settings["keys"] * q.itemsize
    unit = stride_unit(q, k, v, out)
    strip = max(1, settings["scratch"] // (row_bytes * settings["queries"])) * settings["queries"]
    rows_held = min(strip, length)
    weights = torch.empty(rows_held * row_bytes // q.itemsize, dtype=q.dtype, device=q.device)
    peaks = torch.empty(rows_held * n * heads * tiles, dtype=torch.float32, device=q.device)
    masses = torch.empty_like(peaks)
    launches = []
    for start in range(0, length, strip):
        rows, result = q[:, :, start : start + strip], out[:, :, start : start + strip]
        count = rows.shape[2]
        sizes = {"L": count, "M": keys, "tiles": tiles}
        between = {"weights": weights, "peaks": peaks, "masses": masses, **sizes}
        launches += [
            Launch(
                kernel=score_tiles,
                grid=(triton.cdiv(count, settings["queries"]) * tiles, heads, n),
                arguments={"q": rows, "k": k, **between, **strides(unit, q=rows, k=k), "scale": scale * LOG2E},
                constants={"D": width, "UNIT": unit, "QUERIES": settings["queries"], "KEYS": settings["keys"],
                           "DEPTH": settings["depth"]},
                warps=settings["warps"],
                stages=settings["stages"],
            ),
            Launch(
                kernel=weigh_values,
                grid=(triton.cdiv(count, settings["out_queries"]) * triton.cdiv(width, settings["values"]), heads, n),
                arguments={**between, "v": v, "out": result, **strides(unit, v=v, out=result)},
                constants={"D": width, "UNIT": unit, "QUERIES": settings["out_queries"], "KEYS": settings["keys"],
                           "VALUES": settings["values"]},
                warps=settings["out_warps"],
                stages=settings["out_stages"],
            ),
        ]  # fmt: skip
    return launches


def stride_unit(*tensors: Tensor) -> int:
    """8 where every stride is a multiple of it, as in any dense tensor: rows are then read 16 bytes at a time."""
    return 8 if all(step % 8 == 0 for x in tensors for step in _steps(x)) else 1


def strides(unit: int, **tensors: Tensor) -> dict[str, int]:
    """The steps of each tensor along N, H and L in units, named as the kernels' arguments."""
    return {
        f"{name}_{axis}": step // unit
        for name, x in tensors.items()
        for axis, step in zip("nhl", _steps(x), strict=True)
    }


def _steps(x: Tensor) -> list[int]:
    """Strides along N, H and L; an axis of size 1 has none, whatever PyTorch says of it."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
