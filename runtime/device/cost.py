"""What one run of a device program must at least do: floating-point operations and bytes, counted from shapes alone.

FLOPs are those of the tensor cores, a multiply-add as two: convolutions, products, attention. Bytes are each
operation's inputs, weights and outputs once. A view costs nothing, and neither does an input that only gives a size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .operations import dense, evaluate
from .program import VIEWS, DeviceProgram, Operation

PEAK_FLOPS = 798e12
"""A second, fp16 or bf16 products with float32 sums: measured on an H100 SXM (8192^3, random data)."""
PEAK_BYTES = 3.0e12
"""A second: device memory of an H100 SXM, measured by a copy."""

Described = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by name."""


@final
@dataclass(frozen=True, kw_only=True)
class OperationCost:
    """One operation, named by its first output."""

    kind: str
    output: str
    flops: int
    bytes: int

    @property
    def roofline_ms(self) -> float:
        return roofline_ms(self.flops, self.bytes)


@final
@dataclass(frozen=True, kw_only=True)
class ProgramCost:
    """The operations in the order in which they run, views left out."""

    operations: tuple[OperationCost, ...]

    @property
    def flops(self) -> int:
        return sum(one.flops for one in self.operations)

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.operations)

    @property
    def roofline_ms(self) -> float:
        """The sum over the operations, each with its own limit: they run one after the other."""
        return sum(one.roofline_ms for one in self.operations)

    @property
    def kinds(self) -> dict[str, int]:
        """How many operations of each kind, sorted by name."""
        kinds = [one.kind for one in self.operations]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def roofline_ms(flops: int, bytes: int) -> float:
    """Milliseconds at an H100's practical peaks, the slower of computing and moving."""
    return 1e3 * max(flops / PEAK_FLOPS, bytes / PEAK_BYTES)


def program_cost(program: DeviceProgram, weights: Described, inputs: Described) -> ProgramCost:
    """The cost of one run at these shapes; nothing is computed and no memory taken.

    Raises:
        ValueError: a shape that an operation refuses.
        KeyError: an input or weight that is not described.
    """
    known = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in weights.items()}
    known |= {
        name: dense(torch.empty(shape, dtype=dtype, device="meta")) for name, (shape, dtype) in inputs.items()
    }
    costs = []
    for operation in program.operations:
        given = [None if name is None else known[name] for name in operation.inputs]
        outputs = evaluate(operation, given)
        view = operation.kind in VIEWS
        known |= zip(operation.outputs, outputs if view else [dense(value) for value in outputs], strict=True)
        if not view:
            costs.append(OperationCost(
                kind=operation.kind, output=operation.outputs[0], flops=_flops(operation, given, outputs[0]),
                bytes=_bytes(operation, given) + sum(map(_size, outputs)),
            ))  # fmt: skip
    return ProgramCost(operations=tuple(costs))


def _bytes(operation: Operation, given: Sequence[Tensor | None]) -> int:
    # What is read twice by one operation comes from device memory once.
    read = dict(zip(operation.inputs, given, strict=True))
    if operation.kind in ("reshape", "resize"):
        read = {operation.inputs[0]: given[0]}
    return sum(_size(value) for value in read.values() if value is not None)


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _flops(operation: Operation, given: Sequence[Tensor | None], output: Tensor) -> int:
    count = _COUNTED.get(operation.kind)
    return 0 if count is None else 2 * count(given, operation.settings, output)


def _convolution(given: Sequence[Any], settings: Mapping[str, Any], output: Tensor) -> int:
    return output.numel() * int(given[1][0].numel())


def _transposed_convolution(given: Sequence[Any], settings: Mapping[str, Any], output: Tensor) -> int:
    return int(given[0].numel() * given[1][0].numel())


def _output_head(given: Sequence[Any], settings: Mapping[str, Any], output: Tensor) -> int:
    return output.numel() * int(given[3][0].numel())


def _upsample_convolution(given: Sequence[Any], settings: Mapping[str, Any], output: Tensor) -> int:
    _, taps, channels, _ = given[1].shape  # of one phase
    return output.numel() * int(taps) * int(channels)


def _product(given: Sequence[Any], settings: Mapping[str, Any], output: Tensor) -> int:
    # linear has the weight [Cin, Cout], matmul [.., K, M]: the summed axis is the last but one of the second.
    return output.numel() * int(given[1].shape[-2])


def _einsum(given: Sequence[Any], settings: Mapping[str, Any], output: Tensor) -> int:
    terms = settings["equation"].replace(" ", "").split("->")[0].split(",")
    if any("." in term for term in terms):
        raise ValueError(f"[cost] equation={settings['equation']!r}: need every axis by its letter")
    sizes = {
        letter: size
        for term, value in zip(terms, given, strict=True)
        for letter, size in zip(term, value.shape, strict=True)
    }
    return math.prod(sizes.values())


def _attention(given: Sequence[Any], settings: Mapping[str, Any], output: Tensor) -> int:
    q, k, _ = given
    return 2 * int(q.numel()) * int(k.shape[1])  # q k^T, then its product with v


_COUNTED: dict[str, Callable[[Sequence[Any], Mapping[str, Any], Tensor], int]] = {
    "attention": _attention,
    "convolution": _convolution,
    "einsum": _einsum,
    "input_head": _convolution,
    "linear": _product,
    "matmul": _product,
    "output_head": _output_head,
    "transposed_convolution": _transposed_convolution,
    "upsample_convolution": _upsample_convolution,
}
