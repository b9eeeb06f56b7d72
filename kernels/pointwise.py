"""A chain of elementwise operations in one pass over memory: what stands between the layers of a network.

`pointwise_program.py` says what a chain is. Registers are float32, a result is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .check import FLOATS, check_device_shared, empty_channels_last
from .impl import Impl, resolve_impl
from .pointwise_program import check_results, evaluate, parse_program

MOST_INPUTS = 8


def pointwise(
    inputs: list[Tensor],
    program: str,  # JSON: a list of steps
    results: list[int],  # the registers that become tensors
    *,
    impl: Impl | str | None = None,
) -> list[Tensor]:
    """The results of `program`, dense, shaped as the full-size inputs and in the dtype of the first of them.

    Up to 8 inputs of float32, float16, bfloat16. The largest is full-size, and so are all of its shape: volumes
    `N C *spatial` channels last, tokens `N L C`, or `[N, C]`. Their rows of channels may lie apart, so halves of a
    wider tensor are read where they lie. Others are spread over it: `[C]`, or a number per sample and channel, `[N, C]`,
    `N 1 C` beside tokens, `N C 1 1 1` beside volumes, where N may be 1 and strides along it are free.

    Raises ValueError for another dtype, shape or layout, for over 4 results, and what `parse_program` does.
    """
    operands(inputs)
    if impl is None:
        return torch.ops.volcast.pointwise(inputs, program, results)  # type: ignore[no-any-return]
    form = _triton if resolve_impl("pointwise", impl, *inputs) is Impl.TRITON else _eager
    return form(inputs, program, results)


@dataclass(frozen=True, kw_only=True)
class Operands:
    """How the inputs lie: `rows` of `channels` a sample. The stride of a full input is from row to row, of the others
    from sample to sample."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # of the results
    samples: int
    rows: int
    channels: int
    full: tuple[bool, ...]
    strides: tuple[int, ...]


def operands(inputs: list[Tensor]) -> Operands:
    """Raises ValueError for inputs that do not go together."""
    if not 1 <= len(inputs) <= MOST_INPUTS:
        raise ValueError(f"[pointwise] {len(inputs)} inputs: need 1 to {MOST_INPUTS}; cut the program in two")
    for place, x in enumerate(inputs):
        if x.dtype not in FLOATS or 0 in x.shape:
            raise ValueError(
                f"[pointwise] input {place} has dtype {x.dtype} and shape {tuple(x.shape)}: "
                "need float32, float16 or bfloat16 and no empty axis"
            )
    check_device_shared("pointwise", **{f"input {place}": x for place, x in enumerate(inputs)})
    largest = inputs[0]
    for x in inputs:
        if (x.numel(), x.ndim) > (largest.numel(), largest.ndim):
            largest = x
    shape = tuple(largest.shape)
    if not 2 <= len(shape) <= 5:
        raise ValueError(
            f"[pointwise] the largest input has shape {shape}: need [N, C], N L C or N C *spatial"
        )
    n, channels = shape[0], shape[1 if len(shape) >= 4 else -1]
    full = tuple(tuple(x.shape) == shape for x in inputs)
    strides = tuple(
        row_stride(f"input {place}", x) if is_full else _sample_stride(place, x, shape, n, channels)
        for place, (x, is_full) in enumerate(zip(inputs, full, strict=True))
    )
    rows = largest.numel() // (n * channels)
    return Operands(
        shape=shape, dtype=inputs[full.index(True)].dtype, samples=n, rows=rows, channels=channels,
        full=full, strides=strides,
    )  # fmt: skip


def row_stride(name: str, x: Tensor) -> int:
    """Elements from row to row of channels. Raises ValueError where rows are not equally far apart."""
    lines = x.movedim(1, -1) if x.ndim >= 4 else x
    *outer, channels = lines.shape
    apart, rows, even = channels, 1, True
    for size, stride in zip(reversed(outer), reversed(lines.stride()[:-1]), strict=True):
        if size > 1:  # a stride along an axis of size 1 means nothing
            apart = stride if rows == 1 else apart
            even = even and stride == apart * rows
            rows *= size
    if apart < channels or not even or (channels > 1 and lines.stride(-1) != 1):
        formats = {4: "memory_format=torch.channels_last", 5: "memory_format=torch.channels_last_3d"}
        raise ValueError(
            f"[pointwise] {name} of shape {tuple(x.shape)} has strides {x.stride()}: need rows of channels at equal "
            f"distances (channels last); call .contiguous({formats.get(x.ndim, '')})"
        )
    return apart


def _sample_stride(place: int, x: Tensor, shape: tuple[int, ...], n: int, channels: int) -> int:
    ones = (1,) * (len(shape) - 2)
    alike = (n, *ones, channels) if len(shape) == 3 else (n, channels, *ones)
    if tuple(x.shape) not in ((channels,), (n, channels), (1, channels), alike, (1, *alike[1:])):
        raise ValueError(
            f"[pointwise] input {place} has shape {tuple(x.shape)} beside {shape}: need {shape}, {(channels,)}, "
            f"{(n, channels)} or {alike}"
        )
    axis = 0 if x.ndim == 1 else 1 if x.ndim >= 4 else x.ndim - 1
    if channels > 1 and x.stride(axis) != 1:
        raise ValueError(
            f"[pointwise] input {place} of shape {tuple(x.shape)} has strides {x.stride()}: need 1 along the channels; "
            "call .contiguous()"
        )
    return 0 if x.ndim == 1 or x.shape[0] == 1 else x.stride(0)


def empty_results(found: Operands, count: int, device: torch.device) -> list[Tensor]:
    like = torch.empty(0, dtype=found.dtype, device=device)
    if len(found.shape) >= 4:
        return [empty_channels_last(found.shape, like) for _ in range(count)]
    return [like.new_empty(found.shape) for _ in range(count)]


def _eager(inputs: list[Tensor], program: str, results: list[int]) -> list[Tensor]:
    found = operands(inputs)
    ones = (1,) * (len(found.shape) - 2)
    spread = (*ones, found.channels) if len(found.shape) == 3 else (found.channels, *ones)
    registers = [
        (x if full else x.reshape(-1, *spread)).float() for x, full in zip(inputs, found.full, strict=True)
    ]
    steps = parse_program(program, len(inputs))
    check_results(results, len(inputs) + len(steps))
    registers = evaluate(steps, registers)
    outs = empty_results(found, len(results), inputs[0].device)
    return [out.copy_(registers[result]) for out, result in zip(outs, results, strict=True)]


def _triton(inputs: list[Tensor], program: str, results: list[int]) -> list[Tensor]:
    from .launch_triton import run
    from .pointwise_triton import pointwise_launches

    outs, launches = pointwise_launches(inputs, program, results)
    run(launches, inputs[0].device)
    return outs


@torch.library.custom_op("volcast::pointwise", mutates_args=())
def _pointwise_op(inputs: list[Tensor], program: str, results: list[int]) -> list[Tensor]:
    form = _triton if resolve_impl("pointwise", None, inputs[0]) is Impl.TRITON else _eager
    return form(inputs, program, results)


@_pointwise_op.register_fake
def _pointwise_fake(inputs: list[Tensor], program: str, results: list[int]) -> list[Tensor]:
    return empty_results(operands(inputs), len(results), inputs[0].device)
