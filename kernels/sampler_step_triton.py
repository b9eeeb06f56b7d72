"""One step of a sampling plan in one launch: guidance, the row's update, clip, noise, and the step counter itself.

    h    = clip(p * x + q * out, lo, hi)
    next = a * (from_saved ? saved : x) + d * out + e * h + sum_k b[k] * history[read[k]] + c * normal

Traffic: written in PyTorch, every product and sum of the formula reads and writes its own tensor, in float64 as csrc
computes. Here x is read and written once (8 bytes an element), out read once (2 in 16 bits, 4 with `uncond`), and only
the history slots that the row names are touched (4 bytes each). For a latent of 1.4 MB that is a microsecond or two of
an H100's bandwidth: the launch and the chain counter -> row -> history -> ticket are expected to count more.

- Noise is numbered in C D H W order, four normals a Philox block. Work is dealt out as (channel, block), channel
  fastest: the four elements of a block lie C apart in channels-last memory, those of neighbours side by side. A block
  that straddles two channels is drawn for both. Contiguous memory is the case of one channel.
- Every program reads the counter first and takes a ticket last; who takes the last ticket moves the counter on. So a
  captured CUDA graph, replayed, walks through the plan by itself. The only atomic is that integer ticket.
- Compiled without fused multiply-add, and float64 as in csrc: the same input gives csrc's bits, but for a normal in
  7e9 that the C library's log, cos and sin round to the other side (`philox.py`).
"""

# Kernel arguments are blocks and constants of the kernel language, not Python types:
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch_triton import Launch, kernel
from .philox_triton import four_normals


@triton.jit
def _where(mask, flag):
    """The mask where the scalar flag holds; `!= 0` as the interpreter makes integers of a block and a scalar."""
    return (mask & flag) != 0


@triton.jit
def _output(out, uncond, guidance, sample, at, real):
    """The network's output in float32: as it is, or u + w * (c - u) rounded from float64."""
    c = tl.load(out + at, real, 0.0)
    if uncond is None:
        return c.to(tl.float32)
    else:
        w = tl.load(guidance + sample)
        u = tl.load(uncond + at, real, 0.0).to(tl.float64)
        return (u + w * (c.to(tl.float64) - u)).to(tl.float32)


@triton.jit
def _add_past(next, weight, slot, history, size, at, real):
    if history is None:
        return next
    else:
        past = tl.load(history + slot * size + at, _where(real, slot >= 0), 0.0).to(tl.float64)
        return tl.where(slot >= 0, next + weight * past, next)


@triton.jit
def _update(
    x, out, uncond, guidance, history, saved, network_input, weight, slot, bad, seed, identity,
    step, first, sample, count, voxels, C: tl.constexpr, COPIES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The row at `weight` and `slot`, for work items first .. first + BLOCKS - 1 of a sample out of `count`."""
    block = first // C  # of a channel, its first block being number 0
    item = (first % C).to(tl.int32) + tl.arange(0, BLOCKS)
    channel = item % C
    # How many values of the channel's block 0 belong to the channel before it.
    ahead = (channel * (voxels & 3).to(tl.int32)) & 3
    voxel = (item // C * 4 - ahead)[:, None] + tl.arange(0, 4)[None, :]  # from 4 * block on
    left = tl.minimum(voxels - block * 4, BLOCKS * 4).to(tl.int32)
    real = (voxel < left) & (voxel >= tl.where(block > 0, -3, 0))
    base = (sample * voxels + block * 4) * C
    at = voxel * C + channel[:, None]
    size = count * voxels * C

    now32 = tl.load(x + base + at, real, 0.0)
    out32 = _output(out + base, None if uncond is None else uncond + base, guidance, sample, at, real)
    good = tl.load(bad) < 0
    read0, read1, read2, write = tl.load(slot), tl.load(slot + 1), tl.load(slot + 2), tl.load(slot + 3)
    from_saved, save = tl.load(slot + 4) != 0, tl.load(slot + 5) != 0
    e, noise = tl.load(weight + 6), tl.load(weight + 10)

    now = now32.to(tl.float64)
    output = out32.to(tl.float64)
    if saved is None:
        start = now
    else:
        start = tl.where(
            from_saved, tl.load(saved + base + at, _where(real, from_saved), 0.0).to(tl.float64), now
        )
    # The order of the sums is csrc's; a term that the row does not have must not turn -0 into 0.
    next = tl.load(weight) * start + tl.load(weight + 1) * output
    h = tl.load(weight + 2) * now + tl.load(weight + 3) * output
    low, high = tl.load(weight + 4), tl.load(weight + 5)
    h = tl.where(h < low, low, h)  # keeps NaN, so that it is reported
    h = tl.where(h > high, high, h)
    next = tl.where((e != 0) | (write >= 0), next + e * h, next)
    past = None if history is None else history + base
    next = _add_past(next, tl.load(weight + 7), read0, past, size, at, real)
    next = _add_past(next, tl.load(weight + 8), read1, past, size, at, real)
    next = _add_past(next, tl.load(weight + 9), read2, past, size, at, real)
    if noise != 0:
        number = ((channel.to(tl.int64) * voxels) >> 2) + block + item // C
        n0, n1, n2, n3 = four_normals(tl.load(seed), tl.load(identity), step + 1, number)
        normal = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCKS, 4))
        next += noise * normal.to(tl.float64)
    next32 = next.to(tl.float32)

    if saved is not None:
        tl.store(saved + base + at, now32, _where(real, save))
    if history is not None:
        tl.store(past + write * size + at, h.to(tl.float32), _where(real, write >= 0))
    tl.store(x + base + at, next32, real)
    if network_input is not None:
        shown = next32.to(network_input.dtype.element_ty)
        for copy in tl.static_range(COPIES):
            tl.store(network_input + copy * size + base + at, shown, real)
    # Whoever stores here stores the same step, so plain stores do; none happens while all is finite.
    finite = (tl.abs(out32) < float("inf")) & (tl.abs(next32) < float("inf"))
    tl.store(bad + tl.zeros_like(at), step, _where(real & (finite == 0), good))


@kernel
def sampler_step(
    x,  # float32 [N, S, C], changed in place; S voxels, or one channel of N C D H W values
    out,  # as x, float32, float16 or bfloat16
    uncond,  # as out, or None
    guidance,  # float64 [N], or None
    history,  # float32 [slots, N, S, C], or None
    saved,  # as x, or None
    network_input,  # [COPIES, N, S, C], or None
    weights,  # float64 [steps, 11]: a d p q lo hi e b b b c
    slots,  # int32 [steps, 6]: read read read write from_saved save
    counter,  # int32 [2 + N]: step, tickets, each sample's first step that was not finite
    seeds,  # int64 [N]
    samples,  # int64 [N]
    steps: tl.int32,
    voxels: tl.int64,
    C: tl.constexpr, COPIES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    step = tl.load(counter)
    if (step < 0) | (step >= steps):
        return
    row, sample = step.to(tl.int64), tl.program_id(1).to(tl.int64)
    _update(x, out, uncond, guidance, history, saved, network_input, weights + row * 11, slots + row * 6,
            counter + 2 + sample, seeds + sample, samples + sample, step, tl.program_id(0).to(tl.int64) * BLOCKS,
            sample, tl.num_programs(1).to(tl.int64), voxels, C, COPIES, BLOCKS)  # fmt: skip
    tl.debug_barrier()  # every thread has read the counter before the ticket says so
    ticket = tl.atomic_add(counter + 1, 1)
    if ticket == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(counter + 1, 0)
        tl.store(counter, step + 1)


def sampler_step_launches(
    x: Tensor, out: Tensor, uncond: Tensor | None, guidance: Tensor | None, history: Tensor | None,
    saved: Tensor | None, network_input: Tensor | None, weights: Tensor, slots: Tensor, counter: Tensor,
    seeds: Tensor, samples: Tensor,
) -> list[Launch]:  # fmt: skip
    """The launch for inputs that `sampler_step.py` has checked."""
    n, numel = x.shape[0], x[0].numel()
    channels = 1 if x.is_contiguous() else x.shape[1]
    voxels = numel // channels
    settings = configuration("sampler_step", x.dtype, x.numel())
    blocks = (
        voxels + (3 if voxels % 4 == 0 else 6)
    ) // 4  # of a channel, those it shares with others included
    return [
        Launch(
            kernel=sampler_step,
            grid=(triton.cdiv(blocks * channels, settings["blocks"]), n, 1),
            arguments={
                "x": x, "out": out, "uncond": uncond, "guidance": guidance, "history": history, "saved": saved,
                "network_input": network_input, "weights": weights, "slots": slots, "counter": counter,
                "seeds": seeds, "samples": samples, "steps": len(weights), "voxels": voxels,
            },
            constants={
                "C": channels, "BLOCKS": settings["blocks"],
                "COPIES": 1 if network_input is None else len(network_input) // n,
            },
            warps=settings["warps"],
            fuse_multiply_add=False,
        )
    ]  # fmt: skip
