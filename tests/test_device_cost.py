"""The cost of device programs against torch's own FLOP counter and bytes counted by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from volcast.kernels.upsample_convolution import phase_weights
from volcast.runtime.device.cost import PEAK_BYTES, PEAK_FLOPS, ProgramCost, program_cost, roofline_ms
from volcast.runtime.device.operations import dense, evaluate
from volcast.runtime.device.program import DeviceProgram, Operation

CONVOLUTION = {"stride": [1, 1, 1], "padding": [1, 1, 1], "dilation": [1, 1, 1], "groups": 1}


HALF = torch.float16


def meta(*shape: int) -> Tensor:
    return dense(torch.empty(shape, dtype=HALF, device="meta"))


def cost(operations: list[Operation], tensors: dict[str, Tensor], inputs: list[str]) -> ProgramCost:
    program = DeviceProgram(
        inputs=tuple(inputs), outputs=operations[-1].outputs, operations=tuple(operations)
    )
    return program_cost(program, tensors, {name: (tuple(tensors[name].shape), HALF) for name in inputs})


def one(kind: str, tensors: list[Tensor], **settings: object) -> tuple[Operation, dict[str, Tensor]]:
    names = [f"v{place}" for place in range(len(tensors))]
    operation = Operation(kind=kind, inputs=tuple(names), outputs=("y",), settings=settings)
    return operation, dict(zip(names, tensors, strict=True))


@pytest.mark.parametrize(
    ("kind", "shapes", "settings"),
    [
        ("convolution", [(2, 6, 4, 6, 8), (10, 6, 3, 3, 3), (10,)], CONVOLUTION),
        ("convolution", [(2, 6, 4, 6, 8), (10, 3, 2, 2, 2)],
         {"stride": [2, 2, 2], "padding": [0, 0, 0], "dilation": [1, 1, 1], "groups": 2}),
        ("convolution", [(2, 6, 8, 8), (4, 6, 3, 3)],
         {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}),
        ("transposed_convolution", [(2, 6, 4, 4, 4), (6, 8, 4, 4, 4)],
         {**CONVOLUTION, "stride": [2, 2, 2], "output_padding": [0, 0, 0]}),
        ("input_head", [(1, 1, 4, 4, 4), (32, 1, 3, 3, 3), (32,)], {}),
        ("output_head", [(1, 32, 4, 4, 4), (32,), (32,), (3, 32, 3, 3, 3), (3,)],
         {"groups": 8, "eps": 1e-6, "activation": "silu"}),
        ("linear", [(2, 5, 6), (6, 7), (7,)], {}),
        ("linear", [(2, 6, 3, 4, 5), (6, 7)], {}),
        ("matmul", [(2, 3, 5, 6), (2, 3, 6, 7)], {}),
        ("einsum", [(2, 3, 4), (2, 3, 5)], {"equation": "b h q, b h k -> b q k"}),
        ("softmax", [(2, 3, 4)], {"axis": -1}),
    ],
)  # fmt: skip
def test_flops_are_those_that_torch_counts(
    kind: str, shapes: list[tuple[int, ...]], settings: dict[str, object]
) -> None:
    first, *weights = shapes
    operation, tensors = one(
        kind, [meta(*first), *(meta(*shape).contiguous() for shape in weights)], **settings
    )
    with FlopCounterMode(display=False) as counter:
        evaluate(operation, list(tensors.values()))
    assert cost([operation], tensors, ["v0"]).flops == counter.get_total_flops()


def test_attention_has_the_flops_of_torch_s() -> None:
    q, k = meta(2, 24, 32), meta(2, 40, 32)
    operation, tensors = one("attention", [q, k, meta(2, 40, 32)], heads=4, scale=1.0)
    split = [x.unflatten(-1, (4, -1)).transpose(1, 2) for x in tensors.values()]
    with FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(*split)
    assert cost([operation], tensors, ["v0", "v1", "v2"]).flops == counter.get_total_flops()


@pytest.mark.parametrize("axes", [2, 3])
def test_the_phase_convolution_counts_its_own_taps(axes: int) -> None:
    x, weight = meta(1, 8, *(4,) * axes), meta(16, 8, *(3,) * axes)
    operation, tensors = one("upsample_convolution", [x, phase_weights(weight)])
    function = F.conv3d if axes == 3 else F.conv2d
    with FlopCounterMode(display=False) as counter:
        function(F.interpolate(x, scale_factor=2.0), weight, padding=1)
    # Of 3 taps an axis 2 are left.
    assert cost([operation], tensors, ["v0"]).flops * 3**axes == counter.get_total_flops() * 2**axes


def test_bytes_are_inputs_weights_and_outputs_once_and_views_nothing() -> None:
    tensors = {"x": meta(2, 8, 4, 4, 4), "w": meta(24, 8, 1, 1, 1)}
    point = {"stride": [1, 1, 1], "padding": [0, 0, 0], "dilation": [1, 1, 1], "groups": 1}
    names = {"q": (0, 8), "k": (8, 16), "v": (16, 24)}
    operations = [
        Operation(kind="convolution", inputs=("x", "w"), outputs=("qkv",), settings=point),
        Operation(kind="tokens", inputs=("qkv",), outputs=("t",)),
        *(Operation(kind="columns", inputs=("t",), outputs=(name,), settings={"start": a, "stop": b})
          for name, (a, b) in names.items()),
        Operation(kind="attention", inputs=tuple(names), outputs=("a",), settings={"heads": 1, "scale": 1.0}),
        Operation(kind="matmul", inputs=("a", "aT"), outputs=("y",)),
        Operation(kind="concat", inputs=("y", "y"), outputs=("yy",), settings={"axis": 1}),
    ]  # fmt: skip
    tensors["aT"] = meta(2, 8, 64)
    found = cost(operations, tensors, ["x"])
    voxels = 2 * 64
    wanted = {
        "convolution": 2 * (voxels * 8 + 24 * 8 + voxels * 24),
        "attention": 2 * (voxels * 24 + voxels * 8),
        "matmul": 2 * (voxels * 8 + 2 * 8 * 64 + 2 * 64 * 64),
        "concat": 2 * (2 * 64 * 64 + 2 * 2 * 64 * 64),  # y is read once
    }
    assert {one.kind: one.bytes for one in found.operations} == wanted
    assert found.bytes == sum(wanted.values())
    assert found.kinds == dict.fromkeys(sorted(wanted), 1)


def test_an_input_that_only_gives_a_size_is_not_read() -> None:
    operation = Operation(
        kind="reshape", inputs=("x", "like"), outputs=("y",), settings={"sizes": [0, [1, 1], -1]}
    )
    tensors = {"x": meta(2, 12, 10), "like": meta(2, 6, 1000)}
    assert cost([operation], tensors, ["x", "like"]).bytes == 2 * 2 * (2 * 12 * 10)


def test_the_roofline_adds_each_operation_s_own_limit() -> None:
    assert roofline_ms(int(PEAK_FLOPS), 1) == 1000
    assert roofline_ms(1, int(PEAK_BYTES)) == 1000
    wide, _ = one("linear", [meta(4096, 4096), meta(4096, 4096)])
    tensors = {"v0": meta(4096, 4096), "v1": meta(4096, 4096)}
    program = [wide, Operation(kind="softmax", inputs=("y",), outputs=("z",), settings={"axis": -1})]
    found = cost(program, tensors, ["v0"])
    # 2 * 4096^3 FLOPs take longer than 3 matrices of 32 MiB; the softmax only moves two.
    assert found.roofline_ms == pytest.approx(1e3 * (2 * 4096**3 / PEAK_FLOPS + 4 * 4096**2 / PEAK_BYTES))


def test_what_is_not_described_is_named() -> None:
    operation, tensors = one("linear", [meta(2, 3), meta(3, 4)])
    del tensors["v1"]
    with pytest.raises(ValueError, match="v1 is missing"):
        cost([operation], tensors, ["v0"])
