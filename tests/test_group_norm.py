from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from accuracy import assert_as_accurate, volume
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock
from torch import Tensor

from volcast.kernels import group_norm_triton
from volcast.kernels.configuration import configuration, pinned
from volcast.kernels.group_norm import add_group_norm, group_norm
from volcast.kernels.group_norm_triton import group_norm_launches
from volcast.kernels.launch_triton import run

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N, C, C of the second source, groups, spatial
SHAPES = [
    (1, 32, 0, 32, (5, 6, 7)),  # one channel a group
    (2, 64, 0, 32, (3, 4, 5)),  # MONAI's norm at its smallest, batched
    (1, 24, 0, 8, (4, 5, 3)),  # three channels a group: not a power of two
    (2, 20, 4, 3, (3, 5, 2)),  # a group straddles the border of the concat
    (1, 64, 32, 32, (2, 3, 4)),  # concat, channels a group again three
    (1, 6, 0, 1, (1, 1, 1)),  # one voxel, one group
    (3, 16, 0, 4, (9, 11)),  # an image
    (1, 384, 384, 8, (2, 2, 1)),  # a wide concat: 96 channels a group, padded to 128
]


# Small tensors through the two launches of large ones: several programs, some without a row.
SPLIT = {
    "group_norm_single": {"group_elements": 0, "row_bytes": 32, "tile": 64, "stages": 2, "warps": 4},
    "group_norm_split": {
        "columns": 64,
        "tile": 512,
        "stages": 2,
        "programs": 5,
        "apply_programs": 3,
        "warps": 4,
    },
}


@pytest.fixture(params=["single", "split"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    with pinned(SPLIT if request.param == "split" else {}):
        yield request.param


def exact(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool,
    shift: Tensor | None = None, residual: Tensor | None = None, second: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h = x.double()
    if shift is not None:
        h = h + shift.double().reshape(*shift.shape, *(1,) * (x.ndim - 2))
    if residual is not None:
        h = h + residual.double()
    v = h if second is None else torch.cat([h, second.double()], 1)
    y = F.group_norm(v, groups, weight.double(), bias.double(), eps)
    return F.silu(y) if silu else y, h


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "c", "c2", "groups", "spatial"), SHAPES)
def test_as_accurate_as_eager(
    form: str, dtype: torch.dtype, n: int, c: int, c2: int, groups: int, spatial: tuple[int, ...], device: Any
) -> None:
    torch.manual_seed(0)
    x = volume(n, c, *spatial, dtype=dtype, device=device, mean=2, std=3)
    second = volume(n, c2, *spatial, dtype=dtype, device=device, mean=-1) if c2 else None
    weight, bias = torch.randn(2, c + c2, device=device).to(dtype)
    shift = torch.randn(n, c, device=device)

    def both(impl: str) -> Tensor:
        return group_norm(x, groups, weight, bias, activation="silu", shift=shift, second=second, impl=impl)

    truth, _ = exact(x, groups, weight, bias, 1e-6, True, shift, second=second)
    assert_as_accurate(both("triton"), both("eager"), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("second_channels", [0, 8])
def test_the_sum_is_written_once_and_normalised(
    form: str, dtype: torch.dtype, second_channels: int, device: Any
) -> None:
    torch.manual_seed(1)
    x = volume(2, 16, 3, 4, 5, dtype=dtype, device=device)
    residual = volume(2, 16, 3, 4, 5, dtype=dtype, device=device, mean=1)
    second = volume(2, 8, 3, 4, 5, dtype=dtype, device=device) if second_channels else None
    weight, bias = torch.randn(2, 16 + second_channels, device=device)
    shift = torch.randn(2, 16, device=device).to(dtype)
    settings: dict[str, Any] = {"shift": shift, "second": second, "eps": 1e-5}
    y, h = add_group_norm(x, residual, 4, weight, bias, **settings, impl="triton")
    y_eager, h_eager = add_group_norm(x, residual, 4, weight, bias, **settings, impl="eager")
    y_exact, h_exact = exact(x, 4, weight, bias, 1e-5, False, shift, residual, second)
    assert_as_accurate(h, h_eager, h_exact)
    assert_as_accurate(y, y_eager, y_exact)
    assert h.stride() == y[:, :16].contiguous(memory_format=torch.channels_last_3d).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["one for all samples", "of a wider row"])
def test_a_shift_is_read_where_it_lies(form: str, kind: str, dtype: torch.dtype, device: Any) -> None:
    torch.manual_seed(8)
    x, residual = (volume(2, 8, 2, 3, 5, dtype=dtype, device=device) for _ in range(2))
    weight, bias = torch.randn(2, 8, device=device)
    rows = torch.randn(2, 40, device=device)
    shift = rows[:1, :8].expand(2, 8) if kind == "one for all samples" else rows[:, 16:24]
    assert shift.stride(0) != 8
    for added in (None, residual):
        arguments = (2, weight, bias, 1e-6, "silu")
        y, h, launches = group_norm_launches(x, *arguments, shift, added, None)
        expected, sums, alike = group_norm_launches(x, *arguments, shift.contiguous(), added, None)
        run([*launches, *alike], device)
        assert torch.equal(y, expected) and torch.equal(h, sums)
        if kind == "one for all samples":
            for vector in (shift[0], shift[:1]):
                same, _, launches = group_norm_launches(x, *arguments, vector, added, None)
                run(launches, device)
                assert torch.equal(same, y)
        truth, _ = exact(x, 2, weight, bias, 1e-6, True, shift, added)
        settings: dict[str, Any] = {"activation": "silu", "shift": shift}
        if added is None:
            eager, fused = (group_norm(x, 2, weight, bias, **settings, impl=i) for i in ("eager", "triton"))
        else:
            eager, fused = (
                add_group_norm(x, added, 2, weight, bias, **settings, impl=i)[0] for i in ("eager", "triton")
            )
        assert torch.equal(fused, y)
        assert_as_accurate(fused, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_group_becomes_its_bias(form: str, dtype: torch.dtype, device: Any) -> None:
    x = torch.full((1, 4, 4, 3, 8), 7.0, dtype=dtype, device=device).movedim(-1, 1)
    bias = torch.randn(8, device=device).to(dtype)
    y = group_norm(x, 2, torch.ones(8, device=device), bias, impl="triton")
    assert torch.equal(y, bias[None, :, None, None, None].expand_as(y))


def test_a_mean_far_above_the_deviation_does_not_cancel(form: str, device: Any) -> None:
    # E[x^2] - E[x]^2 in float32 would be off by 4096^2 * 6e-8 = 1, as much as the variance.
    torch.manual_seed(2)
    x = volume(1, 8, 6, 5, 4, dtype=torch.float32, device=device, mean=4096)
    one, zero = torch.ones(8, device=device), torch.zeros(8, device=device)
    truth, _ = exact(x, 2, one, zero, 1e-6, False)
    y = group_norm(x, 2, one, zero, impl="triton")
    assert (y.double() - truth).abs().max() < 4096 * torch.finfo(torch.float32).eps * 4


def test_squares_past_the_range_of_float16(form: str, device: Any) -> None:
    torch.manual_seed(3)
    x = volume(1, 8, 6, 5, 4, dtype=torch.float16, device=device, std=2000)
    one, zero = torch.ones(8, device=device), torch.zeros(8, device=device)
    truth, _ = exact(x, 2, one, zero, 1e-6, False)
    y = group_norm(x, 2, one, zero, impl="triton")
    assert_as_accurate(y, group_norm(x, 2, one, zero, impl="eager"), truth)


def test_same_bits_again_and_whatever_else_is_in_the_batch(form: str, device: Any) -> None:
    torch.manual_seed(4)
    x = volume(3, 24, 3, 4, 5, dtype=torch.float16, device=device)
    weight, bias = torch.randn(2, 24, device=device)
    y = group_norm(x, 8, weight, bias, activation="silu", impl="triton")
    assert torch.equal(y, group_norm(x, 8, weight, bias, activation="silu", impl="triton"))
    alone = group_norm(x[1:2], 8, weight, bias, activation="silu", impl="triton")
    assert torch.equal(y[1:2], alone)


def test_the_pinned_table_splits_a_large_volume(device: Any) -> None:
    torch.manual_seed(5)
    x = volume(1, 2, 40, 41, 42, dtype=torch.float32, device=device, mean=1)
    settings = configuration("group_norm_single", x.dtype, x.numel())
    assert x.numel() > settings["group_elements"]
    weight, bias = torch.randn(2, 2, device=device)
    truth, _ = exact(x, 1, weight, bias, 1e-6, False)
    y = group_norm(x, 1, weight, bias, impl="triton")
    assert_as_accurate(y, group_norm(x, 1, weight, bias, impl="eager"), truth)


def test_monai_s_resnet_block(device: Any) -> None:
    """Both norms of a block: the second takes the time embedding and the first convolution's bias as its shift."""
    torch.manual_seed(6)
    block = DiffusionUNetResnetBlock(3, in_channels=16, temb_channels=24, norm_num_groups=4).to(device)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = volume(2, 16, 4, 5, 3, dtype=torch.float32, device=device)
    embedding = torch.randn(2, 24, device=device)
    with torch.no_grad():
        expected = block(x, embedding)
        first = group_norm(x, 4, block.norm1.weight, block.norm1.bias, activation="silu", impl="triton")
        h = F.conv3d(first, block.conv1.conv.weight, None, padding=1)
        shift = block.conv1.conv.bias + block.time_emb_proj(F.silu(embedding))
        h = h.contiguous(memory_format=torch.channels_last_3d)
        y = group_norm(
            h, 4, block.norm2.weight, block.norm2.bias, activation="silu", shift=shift, impl="triton"
        )
        got = x + block.conv2(y)
    assert torch.allclose(got, expected, rtol=0, atol=2e-5)


@triton.jit
def _far(x, y, weight, rows: tl.int64, first: tl.int64, C: tl.constexpr):
    channel = tl.arange(0, C)
    real = channel < C
    none = tl.zeros((C,), tl.float32)
    sample = tl.program_id(0).to(tl.int64)
    mean, _ = group_norm_triton._statistics(
        x, None, None, None, none, sample, first, rows, channel, real, C, 0, rows, C, C, 1, 8, 2
    )
    wide = group_norm_triton._spread(mean, 1, C)
    group_norm_triton._apply(
        x,
        None,
        None,
        none,
        y,
        weight,
        weight,
        wide,
        1.0,
        sample,
        first,
        rows,
        channel,
        real,
        C,
        0,
        rows,
        False,
        8,
        2,
    )


@pytest.mark.slow
def test_offsets_past_two_to_the_31(device: Any) -> None:
    """The last rows of 2^31 + 1280 elements: memory is reserved, only its last pages are touched."""
    rows, c, last = 2**25 + 20, 64, 30
    x = torch.empty(rows, c, dtype=torch.float16, device=device)
    y = torch.empty(rows, c, dtype=torch.float16, device=device)
    torch.manual_seed(7)
    x[-last:] = torch.randn(last, c).to(x)
    weight = torch.ones(c, dtype=torch.float16, device=device)
    _far[(1,)](x, y, weight, rows, rows - last, c)
    tail = x[-last:].double()
    assert torch.allclose(y[-last:].double(), tail - tail.mean() + 1, rtol=0, atol=4e-3)


def test_the_operators_are_sound(device: Any) -> None:
    x = volume(1, 8, 3, 4, 5, dtype=torch.float32, device=device)
    shift = torch.randn(1, 8, device=device)
    both = (2, *torch.randn(2, 16, device=device), 1e-6, "silu", shift, x)
    torch.library.opcheck(torch.ops.volcast.group_norm.default, (x, *both))
    torch.library.opcheck(torch.ops.volcast.add_group_norm.default, (x, x.clone(), *both))


def test_torch_compile_takes_it_whole(device: Any) -> None:
    x = volume(1, 8, 3, 4, 5, dtype=torch.float32, device=device)
    weight, bias = torch.randn(2, 8, device=device)

    def block(x: Tensor) -> Tensor:
        y, h = add_group_norm(x, x, 2, weight, bias, activation="silu")
        return y + h

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))


X = torch.zeros(1, 3, 4, 5, 8).movedim(-1, 1)
P = torch.zeros(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.double()}, r"dtype x float64: need one of float32"),
        ({"x": X.half(), "second": X}, r"dtype x float16, second float32"),
        (
            {"x": X.contiguous()},
            r"need channels last; call .contiguous\(memory_format=torch.channels_last_3d",
        ),
        ({"x": torch.zeros(1, 8, 3)}, r"need N C H W or N C D H W"),
        ({"x": X[:, :, :0]}, r"an axis is empty"),
        ({"groups": 3}, r"groups=3 with 8 channels: need a divisor of 8"),
        ({"groups": 0}, r"groups=0"),
        ({"weight": torch.zeros(7)}, r"weight has shape \(7,\): need \(8,\)"),
        ({"bias": P.double()}, r"bias has dtype float64: need float32 or the input's float32"),
        ({"bias": torch.zeros(16)[::2]}, r"bias is not contiguous"),
        ({"shift": P}, r"shift has shape \(8,\): need \(1, 8\)"),
        ({"shift": torch.zeros(1, 16)[:, ::2]}, r"shift is not contiguous"),
        ({"second": X[:, :, :2]}, r"second has shape \(1, 8, 2, 4, 5\)|strides"),
        ({"weight": P.to("meta")}, r"weight on meta.*move them to one device"),
        ({"eps": 0.0}, r"eps=0.0: need a number between 0 and 1"),
        ({"activation": "relu"}, r"activation='relu': need 'none' or 'silu'"),
        ({"impl": "cuda"}, r"impl='cuda': need one of eager, triton"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"x": X, "groups": 4, "weight": P, "bias": P}
    with pytest.raises(ValueError, match=rf"\[group_norm\].*{message}"):
        group_norm(**{**good, **arguments})


def test_a_residual_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"\[add_group_norm\] residual has shape"):
        add_group_norm(X, X[:, :4].contiguous(memory_format=torch.channels_last_3d), 4, P, P)


def test_more_samples_than_a_launch_can_hold_are_named() -> None:
    x = torch.zeros(65536, 1, 1, 8).movedim(-1, 1)
    with pytest.raises(
        ValueError, match=r"\[single_group_norm\] needs a grid of .*65536.*: give fewer samples"
    ):
        group_norm(x, 4, P, P, impl="triton")
