from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from torch import Tensor

from volcast.kernels.configuration import pinned
from volcast.kernels.layer_norm import add_layer_norm, layer_norm
from volcast.kernels.layer_norm_triton import layer_norm_launches, row_norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL_TILES = {"layer_norm": {"tile": 256, "warps": 4}}
# N, L, C
SHAPES = [
    (1, 40, 32),
    (2, 7, 320),
    (3, 5, 77),  # neither a power of two nor a multiple of 8
    (2, 9, 1),  # nothing varies: y is the bias
    (1, 1, 2),
    (1, 3, 4096),
    (2, 9, 1000),
]


def tokens(n: int, length: int, c: int, dtype: torch.dtype, device: Any, mean: float = 0) -> Tensor:
    return (mean + 2 * torch.randn(n, length, c)).to(device, dtype)


def exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h = x.double()
    if shift is not None:
        h = h + (shift if shift.ndim == 1 else shift[:, None]).double()
    if residual is not None:
        h = h + residual.double()
    return F.layer_norm(h, h.shape[2:], weight.double(), bias.double(), eps), h


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "length", "c"), SHAPES)
def test_as_accurate_as_eager(n: int, length: int, c: int, dtype: torch.dtype, device: Any) -> None:
    torch.manual_seed(0)
    x = tokens(n, length, c, dtype, device, mean=1)
    weight, bias = torch.randn(2, c, device=device).to(dtype)
    truth, _ = exact(x, weight, bias, 1e-5)
    eager = layer_norm(x, weight, bias, impl="eager")
    y = layer_norm(x, weight, bias, impl="triton")
    assert_as_accurate(y, eager, truth)
    with pinned(SMALL_TILES):
        assert_as_accurate(layer_norm(x, weight, bias, impl="triton"), eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "length", "c"), SHAPES)
@pytest.mark.parametrize("given", ["shift", "residual", "both"])
def test_the_sum_is_written_once_and_normalised(
    given: str, n: int, length: int, c: int, dtype: torch.dtype, device: Any
) -> None:
    torch.manual_seed(1)
    x, residual = (tokens(n, length, c, dtype, device) for _ in range(2))
    weight, bias, shift = torch.randn(2, c), torch.randn(2, c), torch.randn(n, c)
    arguments: dict[str, Any] = {
        "weight": weight[0].to(device), "bias": bias[0].to(device), "eps": 1e-3,
        "shift": None if given == "residual" else shift.to(device, dtype),
        "residual": None if given == "shift" else residual,
    }  # fmt: skip
    truth = exact(x, **arguments)
    eager = add_layer_norm(x, **arguments, impl="eager")
    for tiles in ({}, SMALL_TILES):
        with pinned(tiles):
            for fused, e, t in zip(add_layer_norm(x, **arguments, impl="triton"), eager, truth, strict=True):
                assert_as_accurate(fused, e, t)


@pytest.mark.parametrize("kind", ["C", "one for all samples", "of a wider row"])
def test_a_shift_is_read_where_it_lies(kind: str, device: Any) -> None:
    torch.manual_seed(2)
    x, one = tokens(3, 5, 24, torch.float32, device), torch.ones(24, device=device)
    row = torch.randn(3, 72, device=device)
    shift = {
        "C": row[0, :24],
        "one for all samples": row[:1, :24].expand(3, 24),
        "of a wider row": row[:, 24:48],
    }[kind]
    expected = layer_norm(x + (shift if kind == "C" else shift[:, None]), one, one, impl="triton")
    with pinned(SMALL_TILES):
        y, h = add_layer_norm(x, one, one, shift=shift, impl="triton")
    assert torch.allclose(y, expected, rtol=0, atol=1e-6)
    assert torch.equal(h, x + (shift if kind == "C" else shift[:, None]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_token_becomes_the_bias(dtype: torch.dtype, device: Any) -> None:
    x, bias = (
        torch.full((2, 3, 24), 7.0, dtype=dtype, device=device),
        torch.randn(24, device=device).to(dtype),
    )
    y = layer_norm(x, torch.ones(24, device=device), bias, impl="triton")
    assert torch.equal(y, bias.expand_as(y))


def test_a_mean_far_above_the_deviation_does_not_cancel(device: Any) -> None:
    # E[x^2] - E[x]^2 in float32 would be off by 4096^2 * 6e-8 = 1, as much as the variance.
    torch.manual_seed(3)
    x = (4096 + torch.randn(1, 9, 200)).to(device)
    one, zero = torch.ones(200, device=device), torch.zeros(200, device=device)
    truth, _ = exact(x, one, zero, 1e-5)
    y = layer_norm(x, one, zero, impl="triton")
    assert (y.double() - truth).abs().max() < 4096 * torch.finfo(torch.float32).eps * 4


def test_squares_past_the_range_of_float16(device: Any) -> None:
    torch.manual_seed(4)
    x = (2000 * torch.randn(2, 3, 40)).to(device, torch.float16)
    one, zero = torch.ones(40, device=device), torch.zeros(40, device=device)
    truth, _ = exact(x, one, zero, 1e-5)
    assert_as_accurate(layer_norm(x, one, zero, impl="triton"), layer_norm(x, one, zero, impl="eager"), truth)


def test_same_bits_again_and_whatever_else_is_in_the_batch(device: Any) -> None:
    torch.manual_seed(5)
    x, shift = tokens(3, 5, 40, torch.float16, device), torch.randn(3, 40, device=device)
    weight, bias = torch.randn(2, 40, device=device)
    y, h = add_layer_norm(x, weight, bias, shift=shift, impl="triton")
    again, _ = add_layer_norm(x, weight, bias, shift=shift, impl="triton")
    alone, h_alone = add_layer_norm(x[1:2], weight, bias, shift=shift[1:2], impl="triton")
    assert torch.equal(y, again)
    assert torch.equal(y[1:2], alone) and torch.equal(h[1:2], h_alone)


def test_it_writes_where_it_is_told_also_over_its_inputs(device: Any) -> None:
    torch.manual_seed(6)
    x, residual = (tokens(2, 11, 24, torch.float32, device) for _ in range(2))
    weight, bias = torch.randn(2, 24, device=device)
    expected = add_layer_norm(x, weight, bias, residual=residual, impl="triton")
    with pinned(SMALL_TILES):
        y, h, launches = layer_norm_launches(x, weight, bias, 1e-5, None, residual, out=x, sum_out=residual)
    assert y is x and h is residual
    for launch in launches:
        launch()
    assert torch.equal(y, expected[0]) and torch.equal(h, expected[1])


@pytest.mark.slow
def test_offsets_past_two_to_the_31(device: Any) -> None:
    """The second of two samples begins at 2^31: memory is reserved, only its first and last pages are touched."""
    length, c, there = 2**28, 8, 16
    x, y = (torch.empty(length + there, c, dtype=torch.float16, device=device) for _ in range(2))
    x[-there:] = torch.randn(there, c).to(x)
    one = torch.ones(c, device=device)
    row_norm[(1, 2)](x, None, None, None, y, one, one, length, 0, 1e-5, c, c, there)
    truth, _ = exact(x[None, -there:], one, one, 1e-5)
    assert torch.allclose(y[-there:].double(), truth[0], rtol=0, atol=4e-3)


def test_monai_s_order_of_a_transformer_block(device: Any) -> None:
    """x + attention's product and its bias, then the norm: torch.nn.LayerNorm's."""
    torch.manual_seed(7)
    norm, product = torch.nn.LayerNorm(32).to(device), torch.nn.Linear(16, 32).to(device)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x, inner = torch.randn(2, 9, 32, device=device), torch.randn(2, 9, 16, device=device)
    with torch.no_grad():
        h = x + product(inner)
        y, total = add_layer_norm(
            inner @ product.weight.T, norm.weight, norm.bias, shift=product.bias, residual=x, impl="triton"
        )
        assert torch.allclose(total, h, rtol=0, atol=2e-6)
        assert torch.allclose(y, norm(h), rtol=0, atol=1e-5)


def test_the_operators_are_sound(device: Any) -> None:
    x, shift = tokens(2, 3, 8, torch.float32, device), torch.randn(2, 8, device=device)
    weight, bias = torch.randn(2, 8, device=device)
    torch.library.opcheck(torch.ops.volcast.layer_norm.default, (x, weight, bias, 1e-5))
    torch.library.opcheck(torch.ops.volcast.add_layer_norm.default, (x, weight, bias, 1e-5, shift, x.clone()))


def test_torch_compile_takes_it_whole(device: Any) -> None:
    x, (weight, bias) = tokens(2, 3, 8, torch.float32, device), torch.randn(2, 8, device=device)

    def block(x: Tensor) -> Tensor:
        y, h = add_layer_norm(x, weight, bias, residual=x)
        return layer_norm(y + h, weight, bias)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))


X = torch.zeros(2, 3, 8)
P = torch.zeros(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.double()}, r"dtype x float64, residual float32: need one of float32"),
        ({"residual": X.half()}, r"dtype x float32, residual float16"),
        ({"x": X[0]}, r"x has shape \(3, 8\): need N L C"),
        ({"x": X[:, :0]}, r"x has shape \(2, 0, 8\): need N L C without empty axes"),
        ({"x": X[..., ::2]}, r"x has strides .*call .contiguous\(\)"),
        ({"residual": X[:, :2].contiguous()}, r"residual has shape \(2, 2, 8\): need \(2, 3, 8\)"),
        ({"x": torch.zeros(1, 1, 4097), "residual": None}, r"4097 channels: need at most 4096"),
        ({"weight": torch.zeros(7)}, r"weight has shape \(7,\): need \(8,\)"),
        ({"bias": P.double()}, r"bias has dtype float64: need float32 or the input's float32"),
        ({"shift": torch.zeros(1, 8)}, r"shift has shape \(1, 8\): need \(2, 8\)"),
        ({"shift": torch.zeros(7)}, r"shift has shape \(7,\): need \(8,\)"),
        ({"shift": torch.zeros(2, 16)[:, ::2]}, r"shift is not contiguous"),
        ({"shift": P.half()}, r"shift has dtype float16: need float32 or the input's float32"),
        ({"weight": P.to("meta")}, r"weight on meta.*move them to one device"),
        ({"eps": 1.0}, r"eps=1.0: need a number between 0 and 1"),
        ({"residual": None}, r"shift=None, residual=None: need one of them, or call layer_norm"),
        ({"impl": "cuda"}, r"impl='cuda': need one of eager, triton"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"\[add_layer_norm\].*{message}"):
        add_layer_norm(**{"x": X, "weight": P, "bias": P, "residual": X, **arguments})


def test_launches_are_refused_for_channels_that_no_program_holds() -> None:
    x, affine = torch.empty(1, 2, 4097, device="meta"), torch.empty(4097, device="meta")
    with pytest.raises(ValueError, match=r"\[layer_norm\] 4097 channels: need at most 4096"):
        layer_norm_launches(x, affine, affine, 1e-5, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_without_spills(capability: int) -> None:
    """In a process of its own: the interpreter compiles nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 8
    assert all(line["spill_bytes"] == 0 for line in lines), lines


def _compiled(capability: int) -> None:
    """A line for each kernel: narrow, odd and wide rows, with everything that may be added."""
    from volcast.kernels.compile_triton import compile_launch

    for dtype in (torch.float16, torch.float32):
        for channels in (32, 77, 1024, 4096):
            x = torch.empty(2, 64, channels, dtype=dtype, device="meta")
            affine = torch.empty(channels, device="meta")
            (launch,) = layer_norm_launches(x, affine, affine, 1e-5, x[:, 0], x)[2]
            print(json.dumps({"spill_bytes": compile_launch(launch, capability).spill_bytes}))


if __name__ == "__main__":
    _compiled(int(sys.argv[1]))
