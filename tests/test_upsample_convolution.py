from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, volume
from torch import Tensor

from volcast.kernels import upsample_convolution_triton
from volcast.kernels.configuration import pinned, table
from volcast.kernels.launch_triton import run
from volcast.kernels.upsample_convolution import phase_weights, upsample_convolution
from volcast.kernels.upsample_convolution_triton import box_of, upsample_convolution_launches

pytestmark = pytest.mark.usefixtures("bfloat16_products")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N, Cin, Cout, spatial
SHAPES = [
    (1, 8, 8, (3, 3, 5)),  # two boxes of 32 voxels, which overhang every axis
    (1, 8, 8, (1, 1, 1)),  # one voxel: every tap but one reads the padding
    (2, 40, 8, (3, 5)),  # images, batched; three blocks of input channels, the last in part
    (1, 8, 40, (1, 3)),  # an image of one row; three blocks of output channels, the last in part
]


def tiles(**settings: int) -> dict[str, dict[str, int]]:
    """Settings of both rows of tables, so small that tiny tensors need several tiles."""
    small = {"voxels": 32, "channels": 16, "depth": 16, "phases": 2, "stages": 1, "warps": 4, **settings}
    return {"upsample_convolution": small, "upsample_convolution_wide": small}


@pytest.fixture(params=[80, 90], ids=["by pointer", "by descriptor"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: Any) -> Iterator[None]:
    """Both ways to read boxes, in small tiles."""
    if device.type == "cuda" and request.param > 10 * torch.cuda.get_device_capability(device)[0]:
        pytest.skip("this GPU has no tensor descriptors")
    monkeypatch.setattr(upsample_convolution_triton, "_capability", lambda _: request.param)
    with pinned(tiles()):
        yield


def upsampled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    convolution = F.conv3d if x.ndim == 5 else F.conv2d
    return convolution(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


def exact(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """From packed weights, in float64, as a transposed convolution of four taps an axis."""
    axes = x.ndim - 2
    cin, cout = packed.shape[2:]
    weight = torch.zeros(cin, cout, *(4,) * axes, dtype=torch.float64, device=x.device)
    for phase, tap in itertools.product(itertools.product((0, 1), repeat=axes), repeat=2):
        row, column = (int("".join(map(str, bits)), 2) for bits in (phase, tap))
        place = [{(1, 1): 0, (0, 1): 1, (1, 0): 2, (0, 0): 3}[pair] for pair in zip(phase, tap, strict=True)]
        weight[(slice(None), slice(None), *place)] = packed[row, column].double()
    transposed = F.conv_transpose3d if axes == 3 else F.conv_transpose2d
    return transposed(x.double(), weight, None if bias is None else bias.double(), stride=2, padding=1)


def random_weight(cout: int, cin: int, axes: int, dtype: torch.dtype, device: Any) -> Tensor:
    return (torch.randn(cout, cin, *(3,) * axes) / cin**0.5).to(device=device, dtype=dtype)


@pytest.mark.parametrize(("n", "cin", "cout", "spatial"), SHAPES)
def test_packing_is_exact_algebra(n: int, cin: int, cout: int, spatial: tuple[int, ...], device: Any) -> None:
    torch.manual_seed(0)
    x = volume(n, cin, *spatial, dtype=torch.float64, device=device)
    weight = random_weight(cout, cin, len(spatial), torch.float64, device)
    bias = torch.randn(cout, dtype=torch.float64, device=device)
    assert (exact(x, phase_weights(weight), bias) - upsampled(x, weight, bias)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_are_rounded_once(dtype: torch.dtype, device: Any) -> None:
    torch.manual_seed(1)
    weight = random_weight(8, 16, 3, dtype, device)
    packed = phase_weights(weight)
    assert packed.shape == (8, 8, 16, 8) and packed.is_contiguous()
    assert torch.equal(packed, phase_weights(weight.double()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "cin", "cout", "spatial"), SHAPES)
def test_as_accurate_as_eager(
    reader: None, dtype: torch.dtype, n: int, cin: int, cout: int, spatial: tuple[int, ...], device: Any
) -> None:
    torch.manual_seed(2)
    x = volume(n, cin, *spatial, dtype=dtype, device=device)
    packed = phase_weights(random_weight(cout, cin, len(spatial), dtype, device))
    bias = torch.randn(cout, device=device)
    fused = upsample_convolution(x, packed, bias, impl="triton")
    eager = upsample_convolution(x, packed, bias, impl="eager")
    assert fused.stride() == eager.stride() == volume(*fused.shape, dtype=dtype, device=device).stride()
    assert_as_accurate(fused, eager, exact(x, packed, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_the_convolution_of_the_upsampled_tensor(
    reader: None, dtype: torch.dtype, device: Any
) -> None:
    # Packing rounds the weights once more: still within the band of what it replaces.
    torch.manual_seed(3)
    x = volume(1, 16, 2, 3, 2, dtype=dtype, device=device)
    weight = random_weight(16, 16, 3, dtype, device)
    fused = upsample_convolution(x, phase_weights(weight), None, impl="triton")
    truth = upsampled(x.double(), weight.double(), None)
    assert_as_accurate(fused, upsampled(x, weight, None), truth)


def test_impulse_response_is_the_weights(reader: None, device: Any) -> None:
    # One product a result: nothing rounds, so the bits are known.
    x = torch.zeros(1, 3, 3, 2, 8, dtype=torch.float16, device=device).movedim(-1, 1)
    x[0, 5, 1, 1, 0] = 1
    torch.manual_seed(4)
    packed = phase_weights(random_weight(8, 8, 3, torch.float16, device))
    y = upsample_convolution(x, packed, None, impl="triton")
    assert torch.equal(y.double(), exact(x, packed, None))
    assert y.count_nonzero() == 8 * 4 * 4 * 3  # four voxels an axis, three where the edge cuts one off


def test_a_constant_becomes_the_sum_of_the_weights(reader: None, device: Any) -> None:
    torch.manual_seed(5)
    x = torch.ones(1, 2, 3, 4, 8, device=device).movedim(-1, 1)
    weight = random_weight(8, 8, 3, torch.float32, device)
    y = upsample_convolution(x, phase_weights(weight), None, impl="triton")
    inside = y[:, :, 1:-1, 1:-1, 1:-1]
    sums = weight.double().sum((1, 2, 3, 4))[None, :, None, None, None]
    assert torch.allclose(inside.double(), sums.expand_as(inside), rtol=0, atol=1e-5)


def test_same_bits_again_and_whatever_else_is_in_the_batch(reader: None, device: Any) -> None:
    torch.manual_seed(6)
    x = volume(3, 8, 3, 4, dtype=torch.float16, device=device)
    packed = phase_weights(random_weight(8, 8, 2, torch.float16, device))
    y = upsample_convolution(x, packed, None, impl="triton")
    assert torch.equal(y, upsample_convolution(x, packed, None, impl="triton"))
    assert torch.equal(y[1:2], upsample_convolution(x[1:2], packed, None, impl="triton"))


@pytest.mark.parametrize(
    ("kernel", "row"),
    [
        pytest.param(kernel, row, id=f"{kernel} {place}")
        for kernel in ("upsample_convolution", "upsample_convolution_wide")
        for place, row in enumerate(table()[kernel]["rows"])
    ],
)
def test_every_row_of_the_table(
    kernel: str, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: Any
) -> None:
    if device.type == "cpu":
        capability = 90 if kernel.endswith("wide") else 80
        monkeypatch.setattr(upsample_convolution_triton, "_capability", lambda _: capability)
    dtype = getattr(torch, row["dtypes"][0])
    torch.manual_seed(7)
    x = volume(1, 72, 5, 27, dtype=dtype, device=device)
    packed = phase_weights(random_weight(8, 72, 2, dtype, device))
    bias = torch.randn(8, device=device).to(dtype)
    with pinned({kernel: row["settings"]}):
        fused = upsample_convolution(x, packed, bias, impl="triton")
    assert_as_accurate(fused, upsample_convolution(x, packed, bias, impl="eager"), exact(x, packed, bias))


@pytest.mark.parametrize(
    ("grid", "boxes"),
    [
        ((80, 112, 80), 2800),  # BrainLDM's decoder: no box overhangs
        ((10, 14, 10), 9),  # flat boxes of 1 x 16 x 16 would be 10
        ((1, 32, 32), 4),  # an image
        ((1, 1, 1), 1),  # one voxel
    ],
)
def test_boxes_cover_the_grid_with_the_fewest(grid: tuple[int, int, int], boxes: int) -> None:
    box = box_of(256, *grid)
    assert box[0] * box[1] * box[2] == 256
    assert boxes == torch.tensor([-(-size // side) for size, side in zip(grid, box, strict=True)]).prod()


def test_offsets_past_two_to_the_31(reader: None, monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    """A box of 16 planes, the last past 2^31 elements, in x and in y: the memory between is only reserved."""
    monkeypatch.setattr(upsample_convolution_triton, "box_of", lambda *_: (16, 1, 1))
    cin, cout, width = 64, 8, 2_300_000
    x = torch.empty(1, 16, 1, width, cin, dtype=torch.float16, device=device).movedim(-1, 1)
    torch.manual_seed(8)
    x[..., :2] = torch.randn(1, cin, 16, 1, 2)
    packed = phase_weights(random_weight(cout, cin, 3, torch.float16, device))
    with pinned(tiles(depth=64)):
        y, (launch,) = upsample_convolution_launches(x, packed, None)
    assert min(x.stride(2) * 15, y.stride(2) * 31) > 2**31
    run([replace(launch, grid=(4, 1, 1))], x.device)
    truth = exact(x[..., :2], packed, None)
    assert torch.allclose(y[..., :2].double(), truth[..., :2], rtol=0, atol=4e-3)


def test_the_operator_is_sound(device: Any) -> None:
    x = volume(1, 8, 3, 2, 2, dtype=torch.float32, device=device)
    packed = phase_weights(random_weight(16, 8, 3, torch.float32, device))
    for bias in (None, torch.randn(16, device=device)):
        torch.library.opcheck(torch.ops.volcast.upsample_convolution.default, (x, packed, bias))


def test_torch_compile_takes_it_whole(device: Any) -> None:
    x = volume(1, 8, 4, 5, dtype=torch.float32, device=device)
    packed = phase_weights(random_weight(8, 8, 2, torch.float32, device))

    def block(x: Tensor) -> Tensor:
        return upsample_convolution(F.silu(x), packed, None) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))


X = torch.zeros(1, 2, 2, 2, 8).movedim(-1, 1)
P = torch.zeros(8, 8, 8, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.double()}, r"dtype x float64, weights float32: need one of"),
        ({"x": X.contiguous()}, r"need channels last"),
        ({"x": X[:, :, :0]}, r"an axis is empty"),
        ({"x": X[:, :4].contiguous(memory_format=torch.channels_last_3d)}, r"need \(8, 8, 4, Cout\)"),
        (
            {"weights": P[:4, :4]},
            r"weights have shape \(4, 4, 8, 16\): need \(8, 8, 8, Cout\); call phase_weights",
        ),
        ({"weights": torch.zeros(16, 8, 3, 3, 3)}, r"call phase_weights on the convolution's weight"),
        ({"weights": P.mT.contiguous().mT}, r"weights are not contiguous"),
        ({"bias": torch.zeros(8)}, r"bias has shape \(8,\): need \(16,\)"),
        ({"bias": torch.zeros(16).double()}, r"bias has dtype float64"),
        ({"weights": P.to("meta")}, r"weights on meta.*move them to one device"),
        ({"impl": "cuda"}, r"impl='cuda': need one of eager, triton"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"x": X, "weights": P, "bias": None}
    with pytest.raises(ValueError, match=rf"\[upsample_convolution\].*{message}"):
        upsample_convolution(**{**good, **arguments})


@pytest.mark.parametrize(
    ("cin", "cout", "message"),
    [
        (6, 8, r"Cin=6: the fused form needs a multiple of 4"),  # float32: 16 bytes are 4 channels
        (8, 7, r"Cout=7: the fused form needs a multiple of 4"),
    ],
)
def test_channels_that_are_not_whole_16_bytes(cin: int, cout: int, message: str, device: Any) -> None:
    x = volume(1, cin, 2, 2, dtype=torch.float32, device=device)
    packed = phase_weights(random_weight(cout, cin, 2, torch.float32, device))
    assert upsample_convolution(x, packed, None, impl="eager").shape == (1, cout, 4, 4)
    with pytest.raises(ValueError, match=message):
        upsample_convolution(x, packed, None, impl="triton")


def test_memory_that_is_not_aligned(device: Any) -> None:
    x = torch.zeros(1 + 2 * 2 * 8, device=device)[1:].view(1, 2, 2, 8).movedim(-1, 1)
    packed = phase_weights(torch.zeros(8, 8, 3, 3, device=device))
    with pytest.raises(
        ValueError, match=r"x does not begin at a multiple of 16 bytes: call .clone\(\) on it"
    ):
        upsample_convolution(x, packed, None, impl="triton")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(8, 8, 3), r"weight has shape \(8, 8, 3\)"),
        (torch.zeros(8, 8, 3, 1), r"need \[Cout, Cin, 3, 3\]"),
        (torch.zeros(8, 8, 3, 3, dtype=torch.int8), r"dtype torch.int8: need a floating-point one"),
    ],
)
def test_weights_that_cannot_be_packed(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=rf"\[phase_weights\].*{message}"):
        phase_weights(weight)
