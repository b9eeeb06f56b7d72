"""Fused elementwise chains: each input is read once, each result written once, whatever lies between.

The program is a constant of the kernel: its steps unroll while the kernel is traced, registers are a tuple that grows.
A tile is some rows of some channels. Where all inputs are dense and full-size, rows of 8 elements without regard to the
channels take the place of the network's, so 3 channels, or 1, keep whole loads of 16 bytes. Offsets: 64 bits a tile, 32 within.
sin and cos take 32 bytes of stack, for arguments past 10^5. sigmoid's exponential and exp are the device's (2 ulp).
"""

# Kernel arguments are blocks and constants of the kernel language, not Python types:
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .check import check_device_shared, check_shape
from .configuration import configuration
from .launch_triton import Launch, kernel
from .pointwise import MOST_INPUTS, empty_results, operands, row_stride
from .pointwise_program import MOST_RESULTS, check_results, parse_program


@triton.jit
def _step(STEP: tl.constexpr, registers):
    if STEP[0] == "constant":
        return tl.full((1, 1), STEP[1], tl.float32)
    else:
        return _applied(STEP, registers[STEP[1]], registers)


@triton.jit
def _applied(STEP: tl.constexpr, a, registers):
    NAME: tl.constexpr = STEP[0]
    if NAME == "add":
        return a + registers[STEP[2]]
    elif NAME == "sub":
        return a - registers[STEP[2]]
    elif NAME == "mul":
        return a * registers[STEP[2]]
    elif NAME == "div":
        return tl.div_rn(a, registers[STEP[2]])
    elif NAME == "neg":
        return -a
    elif NAME == "sigmoid":
        return tl.sigmoid(a)
    elif NAME == "silu":
        return a * tl.sigmoid(a)
    elif NAME == "gelu":
        return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
    elif NAME == "relu":
        return tl.where(a < 0.0, 0.0, a)  # no maximum: a NaN stays one
    elif NAME == "leaky_relu":
        return tl.where(a > 0.0, a, a * STEP[2])
    elif NAME == "exp":
        return tl.exp(a)
    elif NAME == "sqrt":
        return tl.sqrt_rn(a)
    elif NAME == "sin":
        return tl.sin(a)
    elif NAME == "cos":
        return tl.cos(a)
    else:
        tl.static_assert(NAME == "clamp")
        if STEP[2] is not None:
            a = tl.where(a < STEP[2], STEP[2], a)
        if STEP[3] is not None:
            a = tl.where(a > STEP[3], STEP[3], a)
        return a


@kernel
def pointwise_chain(
    x0, x1, x2, x3, x4, x5, x6, x7,  # full-size: [N, rows, C]; else [N, C]; unit stride along C, or None
    y0, y1, y2, y3,  # [N, rows, C], or None; may be a full input
    rows: tl.int64,
    PROGRAM: tl.constexpr,  # steps as in pointwise.py
    RESULTS: tl.constexpr,  # registers
    FULL: tl.constexpr,  # of each input: full-size?
    STRIDES: tl.constexpr,  # of each input: from row to row if full-size, else from sample to sample
    OUT_STRIDES: tl.constexpr,  # from row to row
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    sample = tl.program_id(2).to(tl.int64)
    row, channel = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows - first)[:, None]
    if C % COLUMNS != 0:
        there = there & (channel < C)[None, :]
    base = sample * rows + first
    inputs = (x0, x1, x2, x3, x4, x5, x6, x7)
    outs = (y0, y1, y2, y3)
    registers = ()
    for i in tl.static_range(len(FULL)):
        if FULL[i]:
            at = inputs[i] + base * STRIDES[i] + (row[:, None] * STRIDES[i] + channel[None, :])
            value = tl.load(at, there, 0.0)
        else:
            value = tl.load(inputs[i] + sample * STRIDES[i] + channel, channel < C, 0.0)[None, :]
        registers = registers + (value.to(tl.float32),)
    for i in tl.static_range(len(PROGRAM)):
        registers = registers + (_step(PROGRAM[i], registers),)
    for i in tl.static_range(len(RESULTS)):
        value = tl.broadcast_to(registers[RESULTS[i]], (ROWS, COLUMNS))
        at = outs[i] + base * OUT_STRIDES[i] + (row[:, None] * OUT_STRIDES[i] + channel[None, :])
        tl.store(at, value.to(outs[i].dtype.element_ty), there)


def pointwise_launches(
    inputs: list[Tensor], program: str, results: list[int], outs: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Launch]]:
    """(outs, launches). An out of the caller's may be a full-size input itself: each element is read before it is
    written; or a column slice of a wider tensor. Raises ValueError where anything does not fit."""
    found = operands(inputs)
    steps = parse_program(program, len(inputs))
    check_results(results, len(inputs) + len(steps))
    if outs is None:
        outs = empty_results(found, len(results), inputs[0].device)
    elif len(outs) != len(results):
        raise ValueError(f"[pointwise] {len(outs)} outs for {len(results)} results: need one each")
    for i, out in enumerate(outs):
        check_shape("pointwise", f"out {i}", out, found.shape)
        check_device_shared("pointwise", **{f"out {i}": out, "input 0": inputs[0]})
        if out.dtype != found.dtype:
            raise ValueError(
                f"[pointwise] out {i} has dtype {out.dtype}: need {found.dtype}, the first full input's"
            )
    strides, out_strides = found.strides, tuple(row_stride(f"out {i}", out) for i, out in enumerate(outs))
    samples, rows, channels = found.samples, found.rows, found.channels
    if all(full or stride == 0 for full, stride in zip(found.full, strides, strict=True)):
        samples, rows = 1, samples * rows
    if all(found.full) and {*strides, *out_strides} == {channels}:
        elements = rows * channels
        channels = math.gcd(elements, 8)
        rows, strides, out_strides = elements // channels, (channels,) * len(inputs), (channels,) * len(outs)
    settings = configuration("pointwise", found.dtype, len(inputs))
    columns = min(triton.next_power_of_2(channels), settings["columns"])
    height = max(1, min(settings["tile"] // columns, triton.next_power_of_2(rows)))
    sources = dict(zip((f"x{i}" for i in range(MOST_INPUTS)), [*inputs, *[None] * MOST_INPUTS], strict=False))
    targets = dict(zip((f"y{i}" for i in range(MOST_RESULTS)), [*outs, *[None] * MOST_RESULTS], strict=False))
    launch = Launch(
        kernel=pointwise_chain,
        grid=(triton.cdiv(rows, height), triton.cdiv(channels, columns), samples),
        arguments={**sources, **targets, "rows": rows},
        constants={
            "PROGRAM": steps, "RESULTS": tuple(results), "FULL": found.full, "STRIDES": strides,
            "OUT_STRIDES": out_strides, "C": channels, "ROWS": height, "COLUMNS": columns,
        },
        warps=settings["warps"],
    )  # fmt: skip
    return outs, [launch]
