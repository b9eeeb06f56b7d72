from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate
from monai.networks.blocks.selfattention import SABlock
from torch import Tensor

from volcast.kernels.attention import attention
from volcast.kernels.attention_triton import attention_launches
from volcast.kernels.configuration import configuration, pinned
from volcast.kernels.impl import Impl
from volcast.kernels.launch_triton import run

pytestmark = pytest.mark.usefixtures("bfloat16_products")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# So small that tiny tensors need several; scratch for one block of queries only.
SMALL_TILES = {
    "attention": {"queries": 32, "keys": 16, "stages": 2, "warps": 4},
    "attention_wide": {
        "scratch": 1, "queries": 32, "keys": 32, "depth": 128, "stages": 2, "warps": 4,
        "out_queries": 16, "values": 128, "out_stages": 2, "out_warps": 4,
    },
}  # fmt: skip
# N, H, L, M, D
SHAPES = [
    (1, 1, 1, 1, 32),  # one query, one key
    (2, 3, 17, 40, 32),  # MAISI's head, batched, cross attention
    (1, 2, 65, 130, 64),  # more than one block of queries of the small tiles, of keys of the table's
    (1, 1, 40, 64, 64),  # the block under the mask is full
    (1, 2, 20, 33, 8),  # the smallest head: padded to what a tensor core multiplies
    (1, 1, 33, 17, 40),  # a head that is no power of two
    (1, 1, 17, 70, 128),  # the widest flash attention
    (1, 2, 20, 70, 136),  # the narrowest wide head: neither depth nor value chunk divides it
    (1, 1, 17, 65, 256),
    (1, 1, 20, 70, 512),  # the brain model's wide heads
    (1, 1, 20, 40, 768),
]


def inputs(
    n: int, heads: int, length: int, keys: int, width: int, dtype: torch.dtype, device: Any
) -> list[Tensor]:
    torch.manual_seed(0)
    lengths = (length, keys, keys)
    return [torch.randn(n, size, heads, width).to(device, dtype).transpose(1, 2) for size in lengths]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(q.double() @ k.double().mT * scale, -1) @ v.double()


def check(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    y = attention(q, k, v, scale=scale, impl="triton")
    assert_as_accurate(y, attention(q, k, v, scale=scale, impl="eager"), exact(q, k, v, scale))
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "heads", "length", "keys", "width"), SHAPES)
def test_as_accurate_as_eager(
    n: int, heads: int, length: int, keys: int, width: int, dtype: torch.dtype, device: Any
) -> None:
    tensors = inputs(n, heads, length, keys, width, dtype, device)
    y = check(*tensors)
    assert y.transpose(1, 2).is_contiguous(), "flattening to tokens would copy"
    with pinned(SMALL_TILES):
        check(*tensors)


@pytest.mark.parametrize("width", [32, 512])
def test_a_scale_of_one_s_own(width: int, device: Any) -> None:
    check(*inputs(1, 1, 17, 40, width, torch.float16, device), scale=0.3)


@pytest.mark.parametrize("width", [32, 136])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_are_read_where_they_lie(width: int, dtype: torch.dtype, device: Any) -> None:
    copies = [x.contiguous() for x in inputs(2, 2, 19, 19, width, dtype, device)]
    q, k, v = copies
    layouts = {
        "one projection for all three": torch.stack(copies).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4),
        "rows of odd length": [torch.cat([x, x[..., :1]], -1)[..., :-1] for x in copies],
        "tokens before samples": [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in copies],
    }  # fmt: skip
    with pinned(SMALL_TILES):
        y = attention(q, k, v, impl="triton")
        for name, views in layouts.items():
            assert all(not x.is_contiguous() for x in views), name
            assert torch.equal(attention(*views, impl="triton"), y), name
        one_k, one_v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
        shared = attention(q, one_k, one_v, impl="triton")
        assert torch.equal(shared, attention(q, one_k.contiguous(), one_v.contiguous(), impl="triton"))


@pytest.mark.parametrize("width", [32, 136])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_one_product_are_read_where_they_lie(width: int, dtype: torch.dtype, device: Any) -> None:
    """[N, L, 3 H D] from one weight: q, k, v are its thirds, and the result goes into columns of a wider tensor."""
    n, heads, length = 2, 3, 19
    torch.manual_seed(3)
    fused = torch.randn(n, length, 3 * heads * width).to(device, dtype)
    tokens = torch.full((n, length, 2 * heads * width), torch.nan, dtype=dtype, device=device)
    q, k, v, out = (
        x.view(n, length, heads, width).transpose(1, 2)
        for x in (*fused.chunk(3, -1), tokens[..., : heads * width])
    )
    assert q.stride(2) == k.stride(2) == 3 * heads * width
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), impl="triton")
    assert torch.equal(check(q, k, v), expected)
    result, launches = attention_launches(q, k, v, width**-0.5, out=out)
    run(launches, device)
    assert result is out and torch.equal(out, expected)
    assert tokens[..., heads * width :].isnan().all()
    assert all(launch.constants["UNIT"] == 8 for launch in launches), "rows are read 16 bytes at a time"


@pytest.mark.parametrize("width", [40, 136])
def test_what_lies_between_the_rows_does_not_matter(width: int, device: Any) -> None:
    q, k, v = inputs(1, 2, 19, 21, width, torch.float16, device)
    padded = []
    for x in (q, k, v):
        n, heads, length, _ = x.shape
        memory = torch.full((n, heads, 2 * length, 2 * width), torch.nan, dtype=x.dtype, device=device)
        memory[:, :, :length, :width] = x
        padded.append(memory[:, :, :length, :width])
    with pinned(SMALL_TILES):
        assert torch.equal(attention(*padded, impl="triton"), attention(q, k, v, impl="triton"))


@pytest.mark.parametrize("width", [64, 512])
def test_scores_past_the_range_of_float16(width: int, device: Any) -> None:
    q, k, v = inputs(1, 1, 17, 65, width, torch.float16, device)
    q, k = q * 300, k * 300
    assert (q.float() @ k.float().mT).abs().max() * width**-0.5 > torch.finfo(torch.float16).max
    check(q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 512])
def test_attention_over_one_key_is_its_value(width: int, dtype: torch.dtype, device: Any) -> None:
    q, k, v = inputs(2, 2, 21, 1, width, dtype, device)
    y = attention(q, 100 * k, v, impl="triton")
    assert torch.allclose(y, v.expand_as(y), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("width", [32, 512])
def test_equal_keys_average_the_values(width: int, device: Any) -> None:
    q, k, v = inputs(1, 2, 20, 37, width, torch.float32, device)
    with pinned(SMALL_TILES):
        y = attention(q, k[:, :, :1].expand_as(k), v, impl="triton")
    assert torch.allclose(y, v.mean(2, keepdim=True).expand_as(y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [32, 512])
def test_the_order_of_the_keys_does_not_matter(width: int, device: Any) -> None:
    q, k, v = inputs(1, 1, 20, 70, width, torch.float32, device)
    order = torch.randperm(70)
    with pinned(SMALL_TILES):
        y = attention(q, k, v, impl="triton")
        shuffled = attention(q, k[:, :, order], v[:, :, order], impl="triton")
    assert torch.allclose(y, shuffled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [32, 512])
def test_a_constant_added_to_all_scores_does_not_matter(width: int, device: Any) -> None:
    q, k, v = inputs(1, 1, 20, 70, width, torch.float32, device)
    q[..., 0], k[..., 0] = 1, 0
    raised = k.clone()
    raised[..., 0] = 4096
    with pinned(SMALL_TILES):
        difference = attention(q, k, v, impl="triton") - attention(q, raised, v, impl="triton")
    # The raised scores are rounded to float32's grid there; an exponential without the maximum taken off is infinite.
    assert difference.abs().max() < 4096 * width**-0.5 * torch.finfo(torch.float32).eps * 8


@pytest.mark.parametrize("width", [32, 256])
def test_same_bits_again_and_whatever_else_is_in_the_batch(width: int, device: Any) -> None:
    q, k, v = inputs(3, 2, 40, 33, width, torch.float16, device)
    with pinned(SMALL_TILES):
        y = attention(q, k, v, impl="triton")
        assert torch.equal(y, attention(q, k, v, impl="triton"))
        assert torch.equal(y[1:2], attention(q[1:2], k[1:2], v[1:2], impl="triton"))


def test_strips_of_queries_change_no_bit(device: Any) -> None:
    q, k, v = inputs(2, 1, 70, 33, 256, torch.float16, device)
    whole = {**SMALL_TILES["attention_wide"], "scratch": 2**20}
    with pinned({"attention_wide": whole}):
        y = attention(q, k, v, impl="triton")
        assert len(attention_launches(q, k, v, 1.0)[1]) == 2
    # 2 samples x 48 keys x 2 bytes a row: strips of 32 rows, the last of 6
    with pinned({"attention_wide": {**whole, "scratch": 192 * 47}}):
        assert len(attention_launches(q, k, v, 1.0)[1]) == 6
        assert torch.equal(attention(q, k, v, impl="triton"), y)


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 256])
def test_offsets_past_two_to_the_31(width: int, device: Any) -> None:
    """Keys 2^26 elements apart: 5 GiB of memory are reserved, only the pages of the keys and values are touched."""
    keys, apart = 40, 2**26
    memory = torch.empty((keys - 1) * apart + 2 * width, dtype=torch.float16, device=device)
    q, k, v = inputs(1, 1, 17, keys, width, torch.float16, device)
    far_k, far_v = (memory.as_strided(k.shape, (0, 0, apart, 1), start) for start in (0, width))
    far_k.copy_(k)
    far_v.copy_(v)
    with pinned(SMALL_TILES):
        assert torch.equal(attention(q, far_k, far_v, impl="triton"), attention(q, k, v, impl="triton"))


def test_the_table_says_who_runs_a_head_on_a_gpu(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    # The package exports the function under the module's name.
    attention_module = sys.modules[attention.__module__]
    for name in ("_triton", "_sdpa"):
        form = getattr(attention_module, name)
        monkeypatch.setattr(attention_module, name, lambda *a, f=form, n=name: ran.append(n) or f(*a))
    monkeypatch.setattr(attention_module, "resolve_impl", lambda operation, impl, *x: Impl.TRITON)
    for width in (32, 128, 512):
        q, k, v = inputs(1, 2, 17, 20, width, torch.float16, device)
        y = attention(q, k, v)
        assert_as_accurate(y, attention_module._eager(q, k, v, width**-0.5), exact(q, k, v))
        assert y.transpose(1, 2).is_contiguous()
        assert ran.pop() == (
            "_sdpa" if configuration("attention_hand_over", q.dtype, width)["sdpa"] else "_triton"
        )
    with pinned({"attention_hand_over": {"sdpa": 1}}):
        attention(*inputs(1, 1, 17, 20, 32, torch.float16, device), impl="triton")
    assert ran == ["_triton"], "a form that was asked for by name was replaced"


def test_monai_s_self_attention(device: Any) -> None:
    torch.manual_seed(2)
    n, length, heads, width = 2, 30, 2, 32
    block = SABlock(heads * width, heads, qkv_bias=True).to(device).eval()
    x = torch.randn(n, length, heads * width, device=device)
    with torch.no_grad():
        qkv = block.qkv(x).unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
        y = attention(*qkv, impl="triton").transpose(1, 2)
        tokens = y.view(n, length, heads * width)
        assert torch.allclose(block.out_proj(tokens), block(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("width", [32, 512])
def test_launches_are_described_without_memory(width: int) -> None:
    q = torch.empty(1, 8, 32768, width, device="meta", dtype=torch.float16)
    out, launches = attention_launches(q, q, q, 1.0)
    assert out.is_meta and out.shape == q.shape
    scratch = sum(x.nbytes for x in launches[0].arguments.values() if isinstance(x, Tensor) and x is not q)
    assert all(sum(launch.grid) > 3 for launch in launches) and scratch < 2**28


def test_the_operator_is_sound(device: Any) -> None:
    tensors = inputs(1, 2, 5, 7, 16, torch.float32, device)
    torch.library.opcheck(torch.ops.volcast.attention.default, (*tensors, 0.25))


def test_torch_compile_takes_it_whole(device: Any) -> None:
    tensors = inputs(1, 2, 5, 7, 16, torch.float32, device)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v).transpose(1, 2).flatten(2)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), block(*tensors))


Q = torch.zeros(1, 2, 5, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": Q.double()}, r"dtype q float64, k float32, v float32: need one of float32"),
        ({"k": Q.half()}, r"dtype q float32, k float16, v float32"),
        ({"q": Q[0]}, r"q has shape \(2, 5, 16\): need N H L D"),
        ({"k": Q[:, :, :0]}, r"k has shape \(1, 2, 0, 16\): need N H L D without empty axes"),
        ({"q": Q[..., :12]}, r"heads of 12: need a multiple of 8 up to 768"),
        ({"q": torch.zeros(1, 1, 1, 776)}, r"heads of 776: need a multiple of 8 up to 768"),
        ({"k": Q[:, :1]}, r"k has shape \(1, 1, 5, 16\): need \(1, 2, 5, 16\)"),
        ({"v": Q[:, :, :4]}, r"v has shape \(1, 2, 4, 16\): need \(1, 2, 5, 16\)"),
        ({"v": torch.zeros(1, 2, 16, 5).mT}, r"v has strides .*the last axis must be contiguous"),
        ({"k": Q.to("meta")}, r"k on meta.*move them to one device"),
        ({"scale": 0.0}, r"scale=0.0: need a positive, finite number"),
        ({"scale": float("inf")}, r"scale=inf"),
        ({"scale": float("nan")}, r"scale=nan"),
        ({"impl": "sdpa"}, r"impl='sdpa': need one of eager, triton"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"\[attention\].*{message}"):
        attention(**{"q": Q, "k": Q, "v": Q, **arguments})


def test_launches_of_a_wrong_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[attention\] heads of 12"):
        attention_launches(Q[..., :12], Q[..., :12], Q[..., :12], 1.0)
