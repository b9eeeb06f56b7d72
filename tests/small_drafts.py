"""Small device programs with random weights, and what they compute in float64 by PyTorch alone."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from torch import Tensor

from volcast.export.draft import Draft
from volcast.export.draft_run import run_draft
from volcast.kernels.pointwise_program import evaluate, parse_program
from volcast.runtime.device.program import Kind, Operation

Shape = tuple[int | None, ...]
VOLUME: Shape = (None, 16, None, None, None)
SIZES = (2, 24, 4, 6, 8)
"""For the free sizes of inputs, by axis."""


class Small:
    """Operations one after the other; each method gives the name of what it makes."""

    def __init__(self, **shapes: Shape) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.shapes = shapes
        self.operations: list[Operation] = []
        self.weights: dict[str, Tensor] = {}

    def op(self, kind: Kind, *inputs: str | None, name: str = "", **settings: Any) -> str:
        name = name or f"{kind}.{len(self.operations)}"
        self.operations.append(Operation(kind=kind, inputs=inputs, outputs=(name,), settings=settings))
        return name

    def weight(self, *shape: int, mean: float = 0, name: str = "") -> str:
        name = name or f"w{len(self.weights)}"
        fan = torch.Size(shape[1:]).numel()
        self.weights[name] = mean + torch.randn(shape, generator=self.generator) / fan**0.5
        return name

    def convolution(
        self, x: str, cin: int, cout: int, kernel: int = 3, bias: bool = True, axes: int = 3, **s: int
    ) -> str:
        window = {"stride": 1, "padding": kernel // 2, "dilation": 1} | s
        groups = window.pop("groups", 1)
        read = [
            x,
            self.weight(cout, cin // groups, *(kernel,) * axes),
            *([self.weight(cout)] if bias else []),
        ]
        settings = {name: [value] * axes for name, value in window.items()}
        return self.op("convolution", *read, groups=groups, **settings)

    def transposed(self, x: str, cin: int, cout: int, kernel: int = 4, axes: int = 3, **s: int) -> str:
        window = {"stride": 2, "padding": 1, "dilation": 1, "output_padding": 0} | s
        groups = window.pop("groups", 1)
        read = [x, self.weight(cin, cout // groups, *(kernel,) * axes), self.weight(cout)]
        settings = {name: [value] * axes for name, value in window.items()}
        return self.op("transposed_convolution", *read, groups=groups, **settings)

    def group_norm(self, x: str, channels: int = 16, groups: int = 4, activation: str = "none") -> str:
        read = (x, self.weight(channels, mean=1), self.weight(channels))
        return self.op("group_norm", *read, groups=groups, eps=1e-6, activation=activation)

    def layer_norm(self, x: str, channels: int = 16) -> str:
        return self.op("layer_norm", x, self.weight(channels, mean=1), self.weight(channels), eps=1e-5)

    def linear(self, x: str, cin: int = 16, cout: int = 16, bias: bool = True) -> str:
        return self.op("linear", x, self.weight(cin, cout), *([self.weight(cout)] if bias else []))

    def concat(self, *parts: str, axis: int = 1) -> str:
        return self.op("concat", *parts, axis=axis)

    def columns(self, x: str, start: int, stop: int) -> str:
        return self.op("columns", x, start=start, stop=stop)

    def step(self, step: str, *inputs: str, numbers: tuple[float | None, ...] = ()) -> str:
        places = [list(dict.fromkeys(inputs)).index(name) for name in inputs]
        read = list(dict.fromkeys(inputs))
        program = json.dumps([[step, *places, *numbers]])
        return self.op("pointwise", *read, program=program, results=[len(read)])

    def add(self, a: str, b: str) -> str:
        return self.step("add", a, b)

    def draft(self, *outputs: str) -> Draft:
        return Draft(
            inputs=tuple(self.shapes), outputs=outputs, operations=tuple(self.operations), weights=self.weights,
            shapes=self.shapes,
        )  # fmt: skip


def feeds(draft: Draft) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes = {
        name: [SIZES[i] if size is None else size for i, size in enumerate(shape)]
        for name, shape in draft.shapes.items()
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def kinds(draft: Draft) -> Counter[str]:
    return Counter(one.kind for one in draft.operations)


def check(before: Draft, after: Draft) -> None:
    """After a pass a draft is as accurate as before it; the oracle is the draft before it in float64."""
    given = feeds(before)
    results = zip(run_draft(after, given), run_draft(before, given), exact(before, given), strict=True)
    for fused, eager, wanted in results:
        assert_as_accurate(fused, eager, wanted)


def exact(draft: Draft, given: dict[str, Tensor]) -> list[Tensor]:
    """The outputs of raw operations in float64."""
    values = {name: value.double() for name, value in (draft.weights | given).items()}
    for one in draft.operations:
        values[one.outputs[0]] = _exact(one, [values[name] for name in one.inputs if name is not None])
    return [values[name] for name in draft.outputs]


def _exact(one: Operation, i: list[Tensor]) -> Tensor:
    s = one.settings
    match one.kind:
        case "convolution":
            function: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[i[0].ndim]
            return function(
                *i, stride=s["stride"], padding=s["padding"], dilation=s["dilation"], groups=s["groups"]
            )
        case "transposed_convolution":
            function = F.conv_transpose2d if i[0].ndim == 4 else F.conv_transpose3d
            return function(*i, stride=s["stride"], padding=s["padding"], output_padding=s["output_padding"],
                            groups=s["groups"], dilation=s["dilation"])  # fmt: skip
        case "group_norm":
            y = F.group_norm(i[0], s["groups"], i[1], i[2], s["eps"])
            return F.silu(y) if s["activation"] == "silu" else y
        case "layer_norm":
            return F.layer_norm(i[0], i[1].shape, i[1], i[2], s["eps"])
        case "linear":
            axis = 1 if i[0].ndim >= 4 else -1
            return F.linear(i[0].movedim(axis, -1), i[1].T, *i[2:3]).movedim(-1, axis)
        case "pointwise":
            whole = max(i, key=lambda x: x.numel())
            ones = (1,) * (whole.ndim - 2)
            spread = (*ones, -1) if whole.ndim == 3 else (-1, *ones)
            # [C] or [N, C] beside a volume, tokens or vectors
            i = [
                x if x.shape == whole.shape else x.reshape(x.shape[0] if x.ndim == 2 else 1, *spread)
                for x in i
            ]
            registers = evaluate(parse_program(s["program"], len(i)), i)
            return registers[s["results"][0]]
        case "concat":
            return torch.cat(i, s["axis"])
        case "columns":
            return i[0].narrow(1 if i[0].ndim >= 4 else -1, s["start"], s["stop"] - s["start"])
        case "tokens":
            return i[0].flatten(2).transpose(1, 2)
        case "volume":
            return i[0].transpose(1, 2).unflatten(2, i[1].shape[2:])
    raise NotImplementedError(one.kind)
