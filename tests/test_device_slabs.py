"""Rows of an operation's output from rows of its inputs: those of the whole output."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from volcast.kernels import phase_weights
from volcast.runtime.device.operations import dense, evaluate
from volcast.runtime.device.program import Operation
from volcast.runtime.device.slab_pass import SlabStep, compute
from volcast.runtime.device.slabs import is_local, local

UNIT = 2.0**-24

Case = tuple[Operation, dict[str, Tensor]]


def window(axes: int, kernel: int, stride: int, padding: int, dilation: int) -> dict[str, list[int]]:
    return {"stride": [stride] * axes, "padding": [padding] * axes, "dilation": [dilation] * axes}


def whole(operation: Operation, values: dict[str, Tensor]) -> list[Tensor]:
    return evaluate(operation, [None if name is None else values[name] for name in operation.inputs])


def check(operation: Operation, values: dict[str, Tensor], start: int, stop: int) -> None:
    """The rows, as close as two orders of the same sums can lie: 2 K u of the sum of their terms' sizes, K <= 27 C."""
    results = whole(operation, values)
    shapes = {name: tuple(x.shape) for name, x in values.items()}
    shapes |= {name: tuple(x.shape) for name, x in zip(operation.outputs, results, strict=True)}
    assert is_local(operation, shapes)
    part = local(operation, shapes, start, stop)
    sources = [None if name is None else (values[name], 0) for name in part.operation.inputs]
    found = compute(evaluate, SlabStep(0, part, (start, stop), ()), sources)
    sizes = whole(operation, {name: x.abs() for name, x in values.items()})
    for one, result, size in zip(found, results, sizes, strict=True):
        wanted, size = (x.narrow(2, start, stop - start) for x in (result, size))
        assert one.shape == wanted.shape and one.movedim(1, -1).is_contiguous()
        terms = max(27 * 8, values["x"].shape[1])
        assert ((one - wanted).abs() <= 2 * terms * UNIT * size + UNIT).all()


def rows(data: st.DataObject, depth: int) -> tuple[int, int]:
    start = data.draw(st.integers(0, depth - 1), "start")
    return start, data.draw(st.integers(start + 1, depth), "stop")


def tensor(*shape: int) -> Tensor:
    return dense(torch.randn(shape))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_convolutions(data: st.DataObject) -> None:
    """Also where every row touches the padding, where a stride leaves rows over, where padding is wider than taps."""
    kernel, stride = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    padding, dilation = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2))
    reach = dilation * (kernel - 1) + 1
    depth = data.draw(st.integers(max(1, reach - 2 * padding), 12))
    axes, n = data.draw(st.sampled_from([2, 3])), data.draw(st.integers(1, 2))
    side = max(2, reach - 2 * padding)
    values = {"x": tensor(n, 4, depth, *(side,) * (axes - 1)), "b": torch.randn(6),
              "w": torch.randn(6, 4, *(kernel,) * axes)}  # fmt: skip
    operation = Operation(
        kind="convolution", inputs=("x", "w", "b"), outputs=("y",),
        settings={**window(axes, kernel, stride, padding, dilation), "groups": 1},
    )  # fmt: skip
    check(operation, values, *rows(data, whole(operation, values)[0].shape[2]))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_transposed_convolutions(data: st.DataObject) -> None:
    kernel, stride = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    padding = data.draw(st.integers(0, (kernel - 1) // 2))
    extra, depth = data.draw(st.integers(0, stride - 1)), data.draw(st.integers(1, 7))
    values = {"x": tensor(2, 4, depth, 2, 3), "w": torch.randn(4, 3, *(kernel,) * 3), "b": torch.randn(3)}
    operation = Operation(
        kind="transposed_convolution", inputs=("x", "w", "b"), outputs=("y",),
        settings={**window(3, kernel, stride, padding, 1), "output_padding": [extra] * 3, "groups": 1},
    )  # fmt: skip
    check(operation, values, *rows(data, whole(operation, values)[0].shape[2]))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_pooling(data: st.DataObject) -> None:
    kernel = data.draw(st.integers(1, 4))
    padding = data.draw(st.integers(0, kernel // 2))
    depth = data.draw(st.integers(kernel, 11))
    operation = Operation(
        kind="average_pool", inputs=("x",), outputs=("y",),
        settings={"kernel": [kernel] * 3, "stride": [data.draw(st.integers(1, 3))] * 3, "padding": [padding] * 3,
                  "ceil_mode": data.draw(st.booleans()), "count_include_pad": data.draw(st.booleans())},
    )  # fmt: skip
    values = {"x": tensor(1, 3, depth, 5, 4)}
    check(operation, values, *rows(data, whole(operation, values)[0].shape[2]))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_heads_and_upsampling(data: st.DataObject) -> None:
    axes, depth = data.draw(st.sampled_from([2, 3])), data.draw(st.integers(1, 8))
    values = {
        "x": tensor(1, 8, depth, *(3,) * (axes - 1)),
        "w": torch.randn(8, 8, *(3,) * axes),
        "b": torch.randn(8),
    }
    kind = data.draw(st.sampled_from(["input_head", "upsample_convolution"]))
    if kind == "upsample_convolution":
        values["w"] = phase_weights(values["w"])
    operation = Operation(kind=kind, inputs=("x", "w", "b"), outputs=("y",))  # type: ignore[arg-type]
    check(operation, values, *rows(data, whole(operation, values)[0].shape[2]))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_resizes(data: st.DataObject) -> None:
    factor, depth = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    mode, by_size = data.draw(st.sampled_from(["nearest", "linear"])), data.draw(st.booleans())
    values = {"x": tensor(1, 2, depth, 3, 2), "like": tensor(1, 1, factor * depth, 6, 2)}
    scale = None if by_size else [float(factor), 2.0, 1.0]
    operation = Operation(
        kind="resize", inputs=("x", "like") if by_size else ("x",), outputs=("y",),
        settings={"mode": mode, "scale": scale, "align_corners": False},
    )  # fmt: skip
    check(operation, values, *rows(data, factor * depth))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_pads(data: st.DataObject) -> None:
    depth = data.draw(st.integers(2, 6))
    before, after = data.draw(st.integers(-1, 4)), data.draw(st.integers(-1, 4))
    if depth + before + after < 1:
        return
    widths = data.draw(st.sampled_from([[1, 0], [0, 2, 1, 1], [0, 1, 0, 1, before, after]]))
    operation = Operation(
        kind="pad", inputs=("x",), outputs=("y",), settings={"widths": widths, "value": 3.0}
    )
    values = {"x": tensor(1, 2, depth, 3, 2)}
    check(operation, values, *rows(data, whole(operation, values)[0].shape[2]))


SAME: dict[str, Callable[[], Case]] = {
    "linear": lambda: (
        Operation(kind="linear", inputs=("x", "w", "b", "second"), outputs=("y",)),
        {"x": tensor(2, 8, 5, 2, 3), "w": torch.randn(8, 8), "b": torch.randn(8), "second": tensor(2, 8, 5, 2, 3)}),
    "pointwise": lambda: (
        Operation(kind="pointwise", inputs=("x", "second", "b", "c"), outputs=("y", "z"),
                  settings={"program": json.dumps([["add", 0, 1], ["mul", 4, 2], ["add", 5, 3]]), "results": [4, 6]}),
        {"x": tensor(2, 8, 5, 2, 3), "second": tensor(2, 8, 5, 2, 3), "b": torch.randn(8), "c": tensor(2, 8, 1, 1, 1)}),
    "concat": lambda: (
        Operation(kind="concat", inputs=("x", "second"), outputs=("y",), settings={"axis": 1}),
        {"x": tensor(2, 8, 5, 2, 3), "second": tensor(2, 3, 5, 2, 3)}),
    "columns": lambda: (
        Operation(kind="columns", inputs=("x",), outputs=("y",), settings={"start": 2, "stop": 5}),
        {"x": tensor(2, 8, 5, 2, 3)}),
    "softmax": lambda: (
        Operation(kind="softmax", inputs=("x",), outputs=("y",), settings={"axis": -1}), {"x": tensor(1, 2, 5, 4)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME)
def test_what_looks_at_one_row(kind: str) -> None:
    operation, values = SAME[kind]()
    for start in range(5):
        for stop in range(start + 1, 6):
            check(operation, values, start, stop)


def test_halos_are_no_wider_than_the_taps() -> None:
    shapes = {"x": (1, 8, 16, 4, 4), "w": (8, 8, 3, 3, 3), "y": (1, 8, 16, 4, 4), "u": (1, 8, 32, 8, 8),
              "p": (8, 8, 8, 8)}  # fmt: skip
    convolution = Operation(
        kind="convolution", inputs=("x", "w"), outputs=("y",), settings=window(3, 3, 1, 1, 1)
    )
    assert local(convolution, shapes, 4, 8).rows == ((3, 9), None)
    assert local(convolution, shapes, 0, 8).rows == ((0, 9), None)
    upsample = Operation(kind="upsample_convolution", inputs=("x", "p"), outputs=("u",))
    assert local(upsample, shapes, 8, 16).rows == ((3, 9), None)
    trilinear = Operation(kind="resize", inputs=("x",), outputs=("u",), settings={"mode": "linear", "align_corners": False})  # fmt: skip
    assert local(trilinear, shapes, 8, 16).rows == ((3, 9),)
    nearest = Operation(kind="resize", inputs=("x",), outputs=("u",), settings={"mode": "nearest"})
    assert local(nearest, shapes, 8, 16).rows == ((4, 8),)


@pytest.mark.parametrize(
    ("kind", "settings", "output"),
    [
        ("resize", {"mode": "linear", "align_corners": True}, (1, 4, 12, 6, 6)),
        ("resize", {"mode": "nearest"}, (1, 4, 9, 6, 6)),
        ("concat", {"axis": 2}, (1, 4, 12, 6, 6)),
        ("concat", {"axis": -3}, (1, 4, 12, 6, 6)),
        ("softmax", {"axis": 2}, (1, 4, 6, 6, 6)),
        ("tokens", {}, (1, 216, 4)),
        ("linear", {}, (1, 216, 4)),
        ("transpose", {}, (1, 4, 6, 6, 6)),
    ],
)
def test_what_needs_the_whole(kind: Any, settings: dict[str, Any], output: tuple[int, ...]) -> None:
    operation = Operation(kind=kind, inputs=("x",), outputs=("y",), settings=settings)
    assert not is_local(operation, {"x": (1, 4, 6, 6, 6), "y": output})
