"""A program with its norms taken apart: what needs the whole volume (the statistics) and what does not.

    h = x + shift + residual                 pointwise, where there is a residual
    v = cat([h, second])                     concat, where there is a second
    y = activation((v - center) * scale + bias)      pointwise, center and scale `[N, C]` from the statistics

An output_head becomes that and a convolution. No other kind looks further than its taps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from .program import DeviceProgram, Operation


@final
@dataclass(frozen=True, kw_only=True)
class Norm:
    """A group norm's statistics: those of the values `parts`, one's channels after the other's, `shift` added to the first.

    `center` (mean - shift) and `scale` (weight / standard deviation) name values `[N, C]`, float32, that no operation
    makes: they are known when the statistics of all parts are.
    """

    parts: tuple[str, ...]
    shift: str | None
    weight: str
    groups: int
    eps: float
    center: str
    scale: str


@final
@dataclass(frozen=True, kw_only=True)
class SlabProgram:
    """`whole` has no group_norm and no output_head; its inputs are the program's, then the norms' centers and scales."""

    inputs: tuple[str, ...]
    whole: DeviceProgram
    norms: tuple[Norm, ...]

    @property
    def operations(self) -> tuple[Operation, ...]:
        return self.whole.operations

    def weights(self) -> frozenset[str]:
        made = {name for operation in self.operations for name in operation.outputs} | set(self.whole.inputs)
        read = {name for norm in self.norms for name in (norm.weight, norm.shift) if name is not None}
        return self.whole.weights() | (read - made)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.whole.outputs


def take_norms_apart(program: DeviceProgram, weights: Mapping[str, Tensor]) -> SlabProgram:
    """The same program without whole-volume norms. Names of new values hold a colon. Offsets are for whoever fills the
    inputs to add."""
    operations: list[Operation] = []
    norms: list[Norm] = []
    for operation in program.operations:
        if operation.kind == "group_norm":
            added, norm = _group_norm(operation)
        elif operation.kind == "output_head":
            added, norm = _output_head(operation, weights)
        else:
            operations.append(operation)
            continue
        operations += added
        norms.append(norm)
    known = [name for norm in norms for name in (norm.center, norm.scale)]
    whole = DeviceProgram(
        inputs=(*program.inputs, *known), outputs=program.outputs, operations=tuple(operations)
    )
    return SlabProgram(inputs=program.inputs, whole=whole, norms=tuple(norms))


def _group_norm(operation: Operation) -> tuple[list[Operation], Norm]:
    x, weight, bias, shift, residual, second = (*operation.inputs, None, None, None)[:6]
    y, settings = operation.outputs[0], operation.settings
    assert x is not None and weight is not None and bias is not None
    operations, first = [], x
    if residual is not None:
        first = operation.outputs[1] if len(operation.outputs) > 1 else f"{y}:sum"
        terms = (x, residual) if shift is None else (x, shift, residual)
        sums: list[list[str | int]] = [["add", 0, 1]] if shift is None else [["add", 0, 1], ["add", 3, 2]]
        operations.append(_pointwise(terms, sums, first))
        shift = None
    parts = (first,) if second is None else (first, second)
    v = first
    if second is not None:
        v = f"{y}:parts"
        operations.append(Operation(kind="concat", inputs=parts, outputs=(v,), settings={"axis": 1}))
    norm = Norm(
        parts=parts, shift=shift, weight=weight, groups=settings["groups"], eps=settings["eps"],
        center=f"{y}:center", scale=f"{y}:scale",
    )  # fmt: skip
    steps: list[list[str | int]] = [["sub", 0, 1], ["mul", 4, 2], ["add", 5, 3]]
    if settings["activation"] == "silu":
        steps.append(["silu", 6])
    operations.append(_pointwise((v, norm.center, norm.scale, bias), steps, y))
    return operations, norm


def _output_head(operation: Operation, weights: Mapping[str, Tensor]) -> tuple[list[Operation], Norm]:
    x, scale, offset, weight, bias = operation.inputs
    assert weight is not None
    y = operation.outputs[0]
    settings = operation.settings
    normalised = Operation(
        kind="group_norm", inputs=(x, scale, offset), outputs=(f"{y}:norm",), settings=settings
    )
    added, norm = _group_norm(normalised)
    ones = [1] * (weights[weight].ndim - 2)
    convolution = Operation(
        kind="convolution", inputs=(f"{y}:norm", weight, bias), outputs=(y,),
        settings={"stride": ones, "padding": ones, "dilation": ones, "groups": 1},
    )  # fmt: skip
    return [*added, convolution], norm


def _pointwise(inputs: tuple[str, ...], steps: list[list[str | int]], output: str) -> Operation:
    settings = {"program": json.dumps(steps), "results": [len(inputs) + len(steps) - 1]}
    return Operation(kind="pointwise", inputs=inputs, outputs=(output,), settings=settings)
