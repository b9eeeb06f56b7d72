"""What one run of a device program must at least do: floating-point operations and bytes, counted from shapes alone.

FLOPs are those of the tensor cores, a multiply-add as two: convolutions, products, attention. Bytes are each
operation's inputs, weights and outputs once. A view costs nothing, and neither does an input that only gives a size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from .memory import Spec, is_view, read_values, shapes, size_of
from .program import DeviceProgram, Operation

PEAK_FLOPS = 798e12
"""A second, fp16 or bf16 products with float32 sums: measured on an H100 SXM (8192^3, random data)."""
PEAK_BYTES = 3.0e12
"""A second: device memory of an H100 SXM, measured by a copy."""

Described = Mapping[str, Spec]
"""Shape and dtype by name."""
Shapes = Sequence[tuple[int, ...]]


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


def program_cost(program: DeviceProgram, weights: Mapping[str, Tensor], inputs: Described) -> ProgramCost:
    """The cost of one run at these shapes; nothing is computed. `weights` may be without memory (on `meta`).

    Raises ValueError for inputs or weights that are missing or refused.
    """
    specs = shapes(program, weights, inputs)
    specs |= {name: (tuple(weights[name].shape), weights[name].dtype) for name in program.weights()}
    costs = []
    for operation in program.operations:
        if is_view(program, operation):
            continue
        # What is read twice by one operation comes from device memory once.
        moved = {*read_values(program, operation), *operation.outputs}
        given = [() if name is None else specs[name][0] for name in operation.inputs]
        costs.append(OperationCost(
            kind=operation.kind, output=operation.outputs[0],
            flops=_flops(operation, given, specs[operation.outputs[0]][0]),
            bytes=sum(size_of(specs[name]) for name in moved),
        ))  # fmt: skip
    return ProgramCost(operations=tuple(costs))


def _flops(operation: Operation, given: Shapes, output: tuple[int, ...]) -> int:
    count = _COUNTED.get(operation.kind)
    return 0 if count is None else 2 * count(given, operation.settings, math.prod(output))


def _convolution(given: Shapes, settings: Mapping[str, Any], output: int) -> int:
    return output * math.prod(given[1][1:])


def _transposed_convolution(given: Shapes, settings: Mapping[str, Any], output: int) -> int:
    return math.prod(given[0]) * math.prod(given[1][1:])


def _output_head(given: Shapes, settings: Mapping[str, Any], output: int) -> int:
    return output * math.prod(given[3][1:])


def _upsample_convolution(given: Shapes, settings: Mapping[str, Any], output: int) -> int:
    _, taps, channels, _ = given[1]  # of one phase
    return output * taps * channels


def _product(given: Shapes, settings: Mapping[str, Any], output: int) -> int:
    # linear has the weight [Cin, Cout], matmul [.., K, M]: the summed axis is the last but one of the second.
    return output * given[1][-2]


def _einsum(given: Shapes, settings: Mapping[str, Any], output: int) -> int:
    terms = settings["equation"].replace(" ", "").split("->")[0].split(",")
    if any("." in term for term in terms):
        raise ValueError(f"[cost] equation={settings['equation']!r}: need every axis by its letter")
    sizes = {
        letter: size
        for term, shape in zip(terms, given, strict=True)
        for letter, size in zip(term, shape, strict=True)
    }
    return math.prod(sizes.values())


def _attention(given: Shapes, settings: Mapping[str, Any], output: int) -> int:
    return 2 * output * given[1][1]  # q k^T, then its product with v, over the keys


_COUNTED: dict[str, Callable[[Shapes, Mapping[str, Any], int], int]] = {
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
