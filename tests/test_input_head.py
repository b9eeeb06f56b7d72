from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, volume
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import Tensor

from volcast.kernels.configuration import pinned, table
from volcast.kernels.input_head import input_head
from volcast.kernels.input_head_triton import input_head_launches

pytestmark = pytest.mark.usefixtures("bfloat16_products")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N, Cin, C, spatial
SHAPES = [
    (1, 1, 32, (4, 3, 5)),  # one channel: an autoencoder's encoder
    (2, 3, 20, (3, 2, 4)),  # neither channel count a power of two, batched
    (1, 7, 24, (2, 5, 3)),  # BrainLDM's latent with its conditions; more than one block of output channels
    (1, 8, 16, (3, 4, 2)),  # the most channels
    (2, 2, 3, (1, 5, 1)),  # axes of size 1; fewer output channels than a tensor core's side
    (1, 1, 16, (1, 1, 1)),  # one voxel: only the middle tap
    (2, 3, 16, (5, 7)),  # an image
    (1, 16, 8, (4, 4)),  # the most channels of an image
]


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """So that tiny volumes need several tiles, programs and blocks of channels, and some programs several tiles."""
    with pinned({"input_head": {"rows": 16, "channels": 16, "programs": 4, "stages": 1, "warps": 4}}):
        yield


def parameters(inputs: int, c: int, axes: int, dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor]:
    return torch.randn(c, inputs, *(3,) * axes).to(device, dtype), torch.randn(c).to(device, dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    convolution = F.conv3d if x.ndim == 5 else F.conv2d
    return convolution(x.double(), weight.double(), bias.double(), padding=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "inputs", "c", "spatial"), SHAPES)
def test_as_accurate_as_eager(
    dtype: torch.dtype, n: int, inputs: int, c: int, spatial: tuple[int, ...], device: Any
) -> None:
    torch.manual_seed(0)
    x = volume(n, inputs, *spatial, dtype=dtype, device=device, mean=1)
    weight, bias = parameters(inputs, c, len(spatial), dtype, device)
    fused, eager = (input_head(x, weight, bias, impl=impl) for impl in ("triton", "eager"))
    assert_as_accurate(fused, eager, exact(x, weight, bias))
    assert fused.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spatial", [(3, 4, 5), (4, 5)])
def test_an_impulse_returns_the_flipped_weights(
    dtype: torch.dtype, spatial: tuple[int, ...], device: Any
) -> None:
    torch.manual_seed(1)
    axes = tuple(range(2, 2 + len(spatial)))
    x = torch.zeros(1, *spatial, 3, dtype=dtype, device=device).movedim(-1, 1)
    x[(0, 1) + (1,) * len(spatial)] = 1  # in the second channel, at (1, 1, 1)
    weight, _ = parameters(3, 16, len(spatial), dtype, device)
    y = input_head(x, weight, torch.zeros(16, device=device), impl="triton")
    expected = torch.zeros_like(y)
    near = (slice(None), slice(None), *(slice(0, 3),) * len(spatial))
    expected[near] = weight[:, 1:2].flip(axes).movedim(1, 0)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("spatial", [(4, 3, 2), (6, 3)])
def test_a_constant_volume_counts_the_taps_inside(spatial: tuple[int, ...], device: Any) -> None:
    x = torch.full((1, *spatial, 2), 2.0, device=device).movedim(-1, 1)
    weight = torch.ones(3, 2, *(3,) * len(spatial), device=device)
    y = input_head(x, weight, torch.arange(3.0, device=device), impl="triton")
    taps = torch.ones((), device=device)
    for size in spatial:
        inside = torch.full((size,), 3.0, device=device)
        inside[[0, -1]] = 2
        taps = taps[..., None] * inside
    assert torch.equal(y[0], torch.stack([4 * taps + channel for channel in range(3)]))


def test_same_bits_again_and_whatever_else_is_in_the_batch(device: Any) -> None:
    torch.manual_seed(2)
    x = volume(3, 3, 3, 4, 5, dtype=torch.float16, device=device)
    affine = parameters(3, 24, 3, torch.float16, device)
    y = input_head(x, *affine, impl="triton")
    assert torch.equal(y, input_head(x, *affine, impl="triton"))
    assert torch.equal(y[1:2], input_head(x[1:2], *affine, impl="triton"))


@pytest.mark.parametrize("inputs", [1, 3, 8])  # each row of the table for 16 bits
def test_the_pinned_table(inputs: int, device: Any) -> None:
    """Its tiles; bias in float32."""
    torch.manual_seed(3)
    x = volume(1, inputs, 3, 5, 7, dtype=torch.float16, device=device)
    weight, bias = parameters(inputs, 72, 3, torch.float16, device)
    rows = [row["settings"] for row in table()["input_head"]["rows"] if "float16" in row["dtypes"]]
    with pinned({"input_head": rows[(1, 3, 8).index(inputs)]}):
        fused = input_head(x, weight, bias.float(), impl="triton")
    assert_as_accurate(fused, input_head(x, weight, bias, impl="eager"), exact(x, weight, bias))


def test_one_launch_whose_programs_share_the_tiles() -> None:
    x = torch.empty(2, 20, 28, 20, 7, dtype=torch.float16, device="meta").movedim(-1, 1)
    weight = torch.empty(256, 7, 3, 3, 3, dtype=torch.float16, device="meta")
    with pinned({"input_head": {"rows": 64, "channels": 128, "programs": 528, "stages": 1, "warps": 8}}):
        y, [launch] = input_head_launches(x, weight, torch.empty(256, device="meta"))
    assert launch.grid == (175, 2, 2)  # no more than there are tiles
    assert y.shape == (2, 256, 20, 28, 20) and y.movedim(1, -1).is_contiguous()


def test_monai_s_unet_head(device: Any) -> None:
    torch.manual_seed(4)
    unet = DiffusionModelUNet(
        spatial_dims=3, in_channels=3, out_channels=3, channels=(8, 8), attention_levels=(False, False),
        num_res_blocks=1, norm_num_groups=4, num_head_channels=8,
    )  # fmt: skip
    head = unet.conv_in.to(device)
    x = volume(1, 3, 3, 4, 5, dtype=torch.float32, device=device)
    with torch.no_grad():
        y = input_head(x, head.conv.weight, head.conv.bias, impl="triton")
        assert torch.allclose(y, head(x), rtol=0, atol=1e-5)


def test_the_operator_is_sound(device: Any) -> None:
    x = volume(1, 2, 2, 3, 2, dtype=torch.float32, device=device)
    torch.library.opcheck(
        torch.ops.volcast.input_head.default, (x, *parameters(2, 8, 3, torch.float32, device))
    )


def test_torch_compile_takes_it_whole(device: Any) -> None:
    x = volume(1, 2, 2, 3, 2, dtype=torch.float32, device=device)
    affine = parameters(2, 8, 3, torch.float32, device)

    def head(x: Tensor) -> Tensor:
        return input_head(x * 2, *affine) + 1

    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), head(x))


X = torch.zeros(1, 2, 3, 4, 3).movedim(-1, 1)
W = torch.zeros(8, 3, 3, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.double()}, r"dtype x float64, weight float32: need one of float32"),
        ({"x": X.half()}, r"dtype x float16, weight float32"),  # the dot takes one dtype
        ({"x": X.contiguous()}, r"need channels last"),
        ({"x": X[:, :, 0, 0]}, r"need N C H W or N C D H W"),
        ({"x": X[:, :, :0]}, r"an axis is empty"),
        ({"x": torch.zeros(1, 2, 3, 4, 9).movedim(-1, 1)}, r"x has 9 channels: need at most 8; more are"),
        ({"x": torch.zeros(1, 2, 3, 17).movedim(-1, 1)}, r"x has 17 channels: need at most 16"),  # an image
        ({"weight": W[:, :2]}, r"weight has shape \(8, 2, 3, 3, 3\): need \(8, 3, 3, 3, 3\)"),
        ({"weight": W[..., :1]}, r"weight has shape \(8, 3, 3, 3, 1\): need \(8, 3, 3, 3, 3\)"),
        ({"weight": W[..., 0]}, r"weight has shape \(8, 3, 3, 3\): need \(C, 3, 3, 3, 3\)"),  # an image's
        ({"weight": W[:0]}, r"weight has shape \(0, 3, 3, 3, 3\): need \(C, 3, 3, 3, 3\)"),
        ({"weight": W.contiguous(memory_format=torch.channels_last_3d)}, r"weight is not contiguous"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\): need \(8,\)"),
        ({"bias": torch.zeros(8).double()}, r"bias has dtype float64"),
        ({"bias": torch.zeros(8, device="meta")}, r"bias on meta: move them to one device"),
        ({"impl": "cuda"}, r"impl='cuda': need one of eager, triton"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"x": X, "weight": W, "bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=rf"\[input_head\].*{message}"):
        input_head(**{**good, **arguments})


def test_too_many_voxels_are_named() -> None:
    x = torch.empty(1, 2**11, 2**10, 2**10, 3, device="meta").movedim(-1, 1)
    with pytest.raises(ValueError, match=r"x has 2147483648 voxels: need at most 2\^31"):
        input_head(x, W.to("meta"), torch.zeros(8, device="meta"))
