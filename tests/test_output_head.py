from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, volume
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import Tensor

from volcast.kernels.configuration import pinned
from volcast.kernels.output_head import output_head
from volcast.kernels.output_head_triton import multiply_along, output_head_launches

pytestmark = pytest.mark.usefixtures("bfloat16_products")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N, C, groups, Cout, spatial, activation
SHAPES = [
    (1, 32, 32, 1, (3, 3, 4), "silu"),  # one channel a group, one output: BrainLDM's head in small
    (2, 20, 4, 3, (2, 2, 4), "silu"),  # channels and groups no powers of two, batched
    (1, 24, 8, 8, (3, 4, 2), "silu"),  # BraTS' eight outputs: 216 columns of 256
    (1, 16, 4, 9, (2, 3, 2), "none"),  # the most outputs
    (2, 8, 2, 1, (1, 5, 1), "none"),  # axes of size 1: most neighbours lie outside
    (1, 6, 1, 1, (1, 1, 1), "silu"),  # one voxel, one group, fewer channels than a tensor core's side
    (1, 24, 1, 2, (6, 7), "silu"),  # an image; one group over two blocks of channels
]


def settings(at_once: int, slabs: int) -> dict[str, dict[str, int]]:
    """Tiles so small that tiny volumes need several, and that many bytes of scratch memory for either form."""
    tile = {"rows": 32, "channels": 16, "stages": 1, "warps": 4}
    return {
        "group_norm_split": {
            "columns": 64, "tile": 512, "stages": 1, "programs": 2, "apply_programs": 1, "warps": 4,
        },
        "output_head_multiply": {"scratch": at_once, **tile},
        "output_head_multiply_along": {"scratch": slabs, **tile},
        "output_head_add": {"elements": 128, "warps": 4},
    }  # fmt: skip


# All taps at once; a slab of one plane after the other.
FORMS = {"at once": settings(1 << 24, 0), "slabs": settings(0, 1)}
# Where v is far below 0, exp(-v) becomes infinite and SiLU 0, as it should: numpy warns in the interpreter.
far_below = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    with pinned(FORMS[request.param]):
        yield request.param


def parameters(c: int, out: int, axes: int, dtype: torch.dtype, device: Any) -> tuple[Tensor, ...]:
    weight = torch.randn(out, c, *(3,) * axes) / c**0.5
    drawn = (1 + torch.randn(c), torch.randn(c), weight, torch.randn(out))
    return tuple(tensor.to(device, dtype) for tensor in drawn)


def exact(
    x: Tensor, groups: int, scale: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, silu: bool
) -> Tensor:
    v = F.group_norm(x.double(), groups, scale.double(), offset.double(), 1e-6)
    convolution = F.conv3d if x.ndim == 5 else F.conv2d
    return convolution(F.silu(v) if silu else v, weight.double(), bias.double(), padding=1)


def check(x: Tensor, groups: int, affine: tuple[Tensor, ...], activation: Any = "silu") -> None:
    fused, eager = (
        output_head(x, groups, *affine, activation=activation, impl=impl) for impl in ("triton", "eager")
    )
    assert_as_accurate(fused, eager, exact(x, groups, *affine, activation == "silu"))
    assert fused.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "c", "groups", "out", "spatial", "activation"), SHAPES)
def test_as_accurate_as_eager(
    form: str, dtype: torch.dtype, n: int, c: int, groups: int, out: int, spatial: tuple[int, ...],
    activation: str, device: Any,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    x = volume(n, c, *spatial, dtype=dtype, device=device, mean=2, std=3)
    check(x, groups, parameters(c, out, len(spatial), dtype, device), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spatial", [(4, 3, 5), (6, 7)])
def test_a_constant_volume_counts_the_taps_inside(
    form: str, dtype: torch.dtype, spatial: tuple[int, ...], device: Any
) -> None:
    """The norm of a constant is its offset; an axis of size n >= 2 has 2, 3, 3, ..., 2 taps inside. Exact."""
    x = torch.full((1, *spatial, 8), 7.0, dtype=dtype, device=device).movedim(-1, 1)
    offset = torch.tensor([1.0, -1, 2, 0, 1, 1, -1, 1], device=device)  # of sum 4
    weight = torch.ones(2, 8, *(3,) * len(spatial), dtype=dtype, device=device)
    weight[1] = -1
    bias = torch.tensor([5.0, 1.0], device=device)
    y = output_head(x, 2, offset, offset, weight, bias, activation="none", impl="triton")
    taps = torch.ones((), device=device)
    for size in spatial:
        inside = torch.full((size,), 3.0, device=device)
        inside[[0, -1]] = 2
        taps = taps[..., None] * inside
    assert torch.equal(y[0], torch.stack([5 + 4 * taps, 1 - 4 * taps]).to(dtype))


def test_where_the_slabs_end_changes_no_bit(device: Any) -> None:
    torch.manual_seed(1)
    n = 2
    x = volume(n, 16, 5, 3, 7, dtype=torch.float16, device=device)
    affine = parameters(16, 2, 3, torch.float16, device)
    results = []
    for planes in (1, 2, 5):
        with pinned(settings(0, planes * 4 * 18 * 32)):  # the 21 voxels of a plane fill a tile of 32
            _, launches = output_head_launches(x, 4, *affine, 1e-6, "silu")
            assert len(launches) == 2 + n * 2 * math.ceil(5 / planes)
            results.append(output_head(x, 4, *affine, impl="triton"))
    assert all(torch.equal(result, results[0]) for result in results)


def test_same_bits_again_and_whatever_else_is_in_the_batch(form: str, device: Any) -> None:
    torch.manual_seed(2)
    x = volume(3, 8, 3, 4, 2, dtype=torch.float16, device=device)
    affine = parameters(8, 3, 3, torch.float16, device)
    y = output_head(x, 4, *affine, impl="triton")
    assert torch.equal(y, output_head(x, 4, *affine, impl="triton"))
    assert torch.equal(y[2:], output_head(x[2:], 4, *affine, impl="triton"))
    with pinned(settings(2 * 4 * 81 * 24, 1)):  # at once: two samples, then the third
        assert form != "at once" or torch.equal(y, output_head(x, 4, *affine, impl="triton"))


@far_below  # of the rows past the volume's end, which are 0
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_far_above_the_deviation(form: str, dtype: torch.dtype, device: Any) -> None:
    # As far as the dtype has values between: x is then exact and only the norm could lose it.
    torch.manual_seed(3)
    mean = {torch.float32: 4096, torch.float16: 256, torch.bfloat16: 32}[dtype]
    x = volume(1, 16, 3, 4, 5, dtype=dtype, device=device, mean=mean)
    check(x, 4, parameters(16, 1, 3, dtype, device))


@far_below
def test_activations_far_from_zero(form: str, device: Any) -> None:
    x = torch.linspace(-1, 1, 60, device=device).reshape(1, 1, 3, 4, 5).expand(1, 16, 3, 4, 5)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    scale, _, weight, bias = parameters(16, 1, 3, torch.float32, device)
    check(x, 4, (torch.full_like(scale, 200.0), torch.zeros_like(scale), weight, bias))


def test_the_pinned_table(device: Any) -> None:
    """Its tiles, with padding in every axis; parameters in float32."""
    torch.manual_seed(4)
    x = volume(1, 24, 3, 5, 7, dtype=torch.float16, device=device)
    scale, offset, weight, bias = parameters(24, 3, 3, torch.float32, device)
    with pinned({"group_norm_split": FORMS["slabs"]["group_norm_split"]}):
        check(x, 8, (scale, offset, weight.half(), bias))


def test_few_launches_for_small_volumes_and_slabs_for_large_ones() -> None:
    def launches(c: int, out: int, *spatial: int) -> list[str]:
        x = torch.empty(1, *spatial, c, dtype=torch.float16, device="meta").movedim(-1, 1)
        norm = torch.empty(c, device="meta")
        weight = torch.empty(out, c, 3, 3, 3, dtype=torch.float16, device="meta")
        arguments = (norm, norm, weight, torch.empty(out, device="meta"), 1e-6, "silu")
        return [launch.name for launch in output_head_launches(x, 32, *arguments)[1]]

    assert launches(256, 3, 20, 28, 20) == ["partial_statistics", "multiply", "add_planes"]
    large = launches(64, 1, 160, 224, 160)
    assert large[:2] == ["partial_statistics", "finish_statistics"]
    assert large[2:] == ["multiply_along", "add_planes"] * 9


def test_monai_s_unet_head(form: str, device: Any) -> None:
    torch.manual_seed(5)
    unet = DiffusionModelUNet(
        spatial_dims=3, in_channels=3, out_channels=3, channels=(8, 8), attention_levels=(False, False),
        num_res_blocks=1, norm_num_groups=4, num_head_channels=8,
    )  # fmt: skip
    norm, _, convolution = unet.out.to(device)
    for parameter in unet.out.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = volume(1, 8, 3, 4, 5, dtype=torch.float32, device=device)
    with torch.no_grad():
        affine = (norm.weight, norm.bias, convolution.conv.weight, convolution.conv.bias)
        y = output_head(x, 4, *affine, eps=norm.eps, impl="triton")
        assert torch.allclose(y, unet.out(x), rtol=0, atol=1e-4)


def test_offsets_past_two_to_the_31(device: Any) -> None:
    """The last plane of 2^31 + 8192 elements: memory is reserved, only its last page is touched."""
    depth, rows, c = 2**20 + 4, 32, 64
    x = torch.empty(1, depth, rows, c, dtype=torch.float16, device=device)
    torch.manual_seed(6)
    x[0, -1] = torch.randn(rows, c).to(x)
    statistics = torch.tensor([0.0, 1.0], device=device).expand(1, c, 2).contiguous()
    one, zero = torch.ones(c, device=device), torch.zeros(c, device=device)
    weight = torch.randn(1, c, 3, 9).to(x)
    planes = torch.empty(2, 1, 9, rows, device=device)
    carry = torch.randn(1, 2, 9, rows, device=device)
    expected = [carry[0, i].double() for i in range(2)]
    multiply_along[(1,)](
        x, statistics, one, zero, weight, planes, carry, 0, depth, rows, depth - 2, depth,
        C=c, GROUP=1, OUT=1, TAPS=9, COLUMNS=16, BLOCK=64, ROWS=32, SILU=False,
    )  # fmt: skip
    for i in range(2):
        expected[i] += (x[0, -1].double() @ weight[0, :, 2 - i].double()).T
        assert torch.allclose(planes[i, 0].double(), expected[i], rtol=0, atol=1e-4)


def test_the_operator_is_sound(device: Any) -> None:
    x = volume(1, 8, 2, 3, 2, dtype=torch.float32, device=device)
    arguments = (x, 2, *parameters(8, 3, 3, torch.float32, device), 1e-6, "silu")
    torch.library.opcheck(torch.ops.volcast.output_head.default, arguments)


def test_torch_compile_takes_it_whole(device: Any) -> None:
    x = volume(1, 8, 2, 3, 2, dtype=torch.float32, device=device)
    affine = parameters(8, 3, 3, torch.float32, device)

    def head(x: Tensor) -> Tensor:
        return output_head(x * 2, 2, *affine, activation="none") + 1

    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), head(x))


X = torch.zeros(1, 2, 3, 4, 8).movedim(-1, 1)
P = torch.zeros(8)
W = torch.zeros(2, 8, 3, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.double()}, r"dtype x float64, weight float32: need one of float32"),
        ({"x": X.half()}, r"dtype x float16, weight float32"),  # the dot takes one dtype
        ({"x": X.contiguous()}, r"need channels last"),
        ({"x": torch.zeros(1, 8, 3)}, r"need N C H W or N C D H W"),
        ({"x": X[:, :, :0]}, r"an axis is empty"),
        ({"groups": 3}, r"groups=3 with 8 channels: need a divisor of 8"),
        ({"groups": 0}, r"groups=0"),
        ({"norm_weight": torch.zeros(7)}, r"norm_weight has shape \(7,\): need \(8,\)"),
        ({"norm_bias": P.double()}, r"norm_bias has dtype float64"),
        ({"weight": W[:, :7]}, r"weight has shape \(2, 7, 3, 3, 3\): need \(2, 8, 3, 3, 3\)"),
        ({"weight": W[..., :1]}, r"weight has shape \(2, 8, 3, 3, 1\): need \(2, 8, 3, 3, 3\)"),
        ({"weight": W[..., 0]}, r"weight has shape \(2, 8, 3, 3\): need \(Cout, 8, 3, 3, 3\)"),  # an image's
        ({"weight": torch.zeros(10, 8, 3, 3, 3)}, r"with Cout from 1 to 9; more output channels"),
        ({"weight": W[:0]}, r"with Cout from 1 to 9"),
        ({"weight": W.contiguous(memory_format=torch.channels_last_3d)}, r"weight is not contiguous"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\): need \(2,\)"),
        ({"bias": torch.zeros(2, device="meta")}, r"bias on meta: move them to one device"),
        ({"eps": 0.0}, r"eps=0.0: need a number between 0 and 1"),
        ({"activation": "relu"}, r"activation='relu': need 'none' or 'silu'"),
        ({"impl": "cuda"}, r"impl='cuda': need one of eager, triton"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "x": X, "groups": 4, "norm_weight": P, "norm_bias": P, "weight": W, "bias": torch.zeros(2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"\[output_head\].*{message}"):
        output_head(**{**good, **arguments})


def test_too_many_voxels_are_named() -> None:
    x = torch.empty(1, 2**11, 2**10, 2**10, 8, device="meta").movedim(-1, 1)
    meta = [tensor.to("meta") for tensor in (P, P, W, torch.zeros(2))]
    with pytest.raises(ValueError, match=r"x has 2147483648 voxels: need at most 2\^31"):
        output_head(x, 4, *meta)
