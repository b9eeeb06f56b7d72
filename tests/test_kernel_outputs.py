"""Launches that write into the caller's memory: the same bits, there and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import volume
from torch import Tensor

from volcast.kernels.attention_triton import attention_launches
from volcast.kernels.configuration import pinned
from volcast.kernels.group_norm_triton import group_norm_launches
from volcast.kernels.input_head_triton import input_head_launches
from volcast.kernels.launch_triton import Launch, run
from volcast.kernels.layer_norm_triton import layer_norm_launches
from volcast.kernels.output_head_triton import output_head_launches
from volcast.kernels.pointwise_triton import pointwise_launches
from volcast.kernels.upsample_convolution import phase_weights
from volcast.kernels.upsample_convolution_triton import upsample_convolution_launches

Launches = Callable[..., tuple[list[Tensor], list[Launch]]]
SPLIT = {
    "columns": 64, "tile": 512, "stages": 2, "programs": 5, "apply_programs": 3, "warps": 4,
}  # fmt: skip
FORMS: dict[str, dict[str, dict[str, int]]] = {
    "group_norm in two": {
        "group_norm_single": {"group_elements": 0, "row_bytes": 32, "tile": 64, "stages": 2, "warps": 4},
        "group_norm_split": SPLIT,
    },
    "output_head": {"group_norm_split": SPLIT},
    "output_head in slabs": {
        "group_norm_split": SPLIT,
        "output_head_multiply": {"scratch": 0, "rows": 32, "channels": 16, "stages": 1, "warps": 4},
        "output_head_multiply_along": {"scratch": 1, "rows": 32, "channels": 16, "stages": 1, "warps": 4},
    },
}
HALF = torch.float16


def group_norm(device: Any) -> Launches:
    x, residual = (volume(2, 8, 3, 4, 5, dtype=HALF, device=device) for _ in range(2))
    weight, bias = torch.randn(2, 8, device=device)

    def make(out: Tensor | None = None, sum_out: Tensor | None = None) -> tuple[list[Tensor], list[Launch]]:
        y, h, launches = group_norm_launches(
            x, 2, weight, bias, 1e-6, "silu", None, residual, None, out=out, sum_out=sum_out
        )
        return [y, h], launches

    return make


def concat_group_norm(device: Any) -> Launches:
    x, second = (volume(2, c, 3, 4, 5, dtype=HALF, device=device) for c in (8, 4))
    weight, bias = torch.randn(2, 12, device=device)

    def make(out: Tensor | None = None) -> tuple[list[Tensor], list[Launch]]:
        y, _, launches = group_norm_launches(x, 3, weight, bias, 1e-6, "none", None, None, second, out=out)
        return [y], launches

    return make


def layer_norm(device: Any) -> Launches:
    x, residual = torch.randn(2, 2, 5, 24, device=device).to(HALF)
    weight, bias = torch.randn(2, 24, device=device)

    def make(out: Tensor | None = None, sum_out: Tensor | None = None) -> tuple[list[Tensor], list[Launch]]:
        y, h, launches = layer_norm_launches(x, weight, bias, 1e-5, None, residual, out=out, sum_out=sum_out)
        return [y, h], launches

    return make


def pointwise(device: Any) -> Launches:
    x, gain = volume(2, 8, 3, 5, dtype=HALF, device=device), torch.randn(8, device=device)

    def make(*outs: Tensor) -> tuple[list[Tensor], list[Launch]]:
        return pointwise_launches([x, gain], '[["mul", 0, 1], ["silu", 2]]', [2, 3], list(outs) or None)

    return make


def attention(width: int) -> Callable[[Any], Launches]:
    def prepare(device: Any) -> Launches:
        q, k, v = torch.randn(3, 2, 2, 19, width, device=device).to(HALF)

        def make(out: Tensor | None = None) -> tuple[list[Tensor], list[Launch]]:
            y, launches = attention_launches(q, k, v, 0.25, out=out)
            return [y], launches

        return make

    return prepare


def input_head(device: Any) -> Launches:
    x = volume(2, 3, 4, 3, 5, dtype=HALF, device=device)
    weight, bias = torch.randn(20, 3, 3, 3, 3, device=device).to(HALF), torch.randn(20, device=device)

    def make(out: Tensor | None = None) -> tuple[list[Tensor], list[Launch]]:
        y, launches = input_head_launches(x, weight, bias, out=out)
        return [y], launches

    return make


def output_head(device: Any) -> Launches:
    x = volume(2, 8, 4, 3, 5, dtype=HALF, device=device)
    weight, (bias, scale, offset) = (
        torch.randn(3, 8, 3, 3, 3, device=device).to(HALF),
        torch.randn(3, 8, device=device),
    )

    def make(out: Tensor | None = None) -> tuple[list[Tensor], list[Launch]]:
        y, launches = output_head_launches(x, 2, scale, offset, weight, bias[:3], 1e-6, "silu", out=out)
        return [y], launches

    return make


def upsample_convolution(device: Any) -> Launches:
    x = volume(1, 8, 3, 2, 3, dtype=HALF, device=device)
    weights = phase_weights(torch.randn(8, 8, 3, 3, 3, device=device).to(HALF))

    def make(out: Tensor | None = None) -> tuple[list[Tensor], list[Launch]]:
        y, launches = upsample_convolution_launches(x, weights, None, out=out)
        return [y], launches

    return make


CASES: dict[str, Callable[[Any], Launches]] = {
    "group_norm": group_norm,
    "group_norm in two": group_norm,
    "concat_group_norm": concat_group_norm,
    "layer_norm": layer_norm,
    "pointwise": pointwise,
    "attention": attention(32),
    "attention_wide": attention(136),
    "input_head": input_head,
    "output_head": output_head,
    "output_head in slabs": output_head,
    "upsample_convolution": upsample_convolution,
}
GUARD = 256


def in_arena(like: Tensor) -> tuple[Tensor, Tensor]:
    """(memory, a view of it that lies as `like`): NaN everywhere, also before and after the view."""
    memory = torch.full((like.numel() + 2 * GUARD,), torch.nan, dtype=like.dtype, device=like.device)
    return memory, memory.as_strided(like.shape, like.stride(), GUARD)


@pytest.mark.parametrize("name", CASES)
def test_it_writes_where_it_is_told_and_nowhere_else(name: str, device: Any) -> None:
    torch.manual_seed(0)
    with pinned(FORMS.get(name, {})):
        make = CASES[name](device)
        expected, launches = make()
        run(launches, device)
        memories, outs = zip(*(in_arena(y) for y in expected), strict=True)
        results, launches = make(*outs)
        run(launches, device)
    for memory, out, result, y in zip(memories, outs, results, expected, strict=True):
        assert result is out
        assert torch.equal(out, y)
        assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all()


@pytest.mark.parametrize("name", CASES)
def test_an_output_that_does_not_fit_is_named(name: str, device: Any) -> None:
    with pinned(FORMS.get(name, {})):
        make = CASES[name](device)
        (y, *others), _ = make()
        apart = y.new_empty((*y.shape[:-1], 2 * y.shape[-1]))[..., ::2]
        wrong = {
            "has shape": y[..., :-1],
            "dtype": y.float(),
            "move them to one device": y.to("meta"),
            "strides": apart,
        }
        for message, out in wrong.items():
            with pytest.raises(
                ValueError,
                match=rf"^\[{name.split()[0].removeprefix('concat_').removesuffix('_wide')}\] .*{message}",
            ):
                make(out, *others)
        if others:
            with pytest.raises(ValueError, match=r"\] (sum_out|out 1) has shape"):
                make(y, others[0][..., :-1])


@pytest.mark.parametrize("name", ["group_norm", "group_norm in two"])
def test_a_norm_may_overwrite_what_it_reads(name: str, device: Any) -> None:
    """y over x or over the residual: each element is read for the last time just before."""
    torch.manual_seed(1)
    weight, bias = torch.randn(2, 8, device=device)
    for taken in ("x", "residual"):
        given = {key: volume(2, 8, 3, 4, 5, dtype=HALF, device=device) for key in ("x", "residual")}

        def launches(given: dict[str, Tensor] = given, **outs: Tensor) -> tuple[Tensor, Tensor, list[Launch]]:
            return group_norm_launches(given["x"], 2, weight, bias, 1e-6, "silu", None, given["residual"], None, **outs)  # fmt: skip

        with pinned(FORMS.get(name, {})):
            y, h, plain = launches()
            run(plain, device)
            sums = torch.empty_like(h)
            run(launches(out=given[taken], sum_out=sums)[2], device)
        assert torch.equal(given[taken], y) and torch.equal(sums, h)


@pytest.mark.parametrize("name", ["group_norm", "group_norm in two"])
def test_a_sum_that_nobody_asks_for_changes_nothing(name: str, device: Any) -> None:
    torch.manual_seed(2)
    with pinned(FORMS.get(name, {})):
        make = CASES[name](device)
        (y, _), launches = make()
        run(launches, device)
        out = torch.empty_like(y)
        run(make(out)[1], device)
    assert torch.equal(out, y)


def test_a_sum_is_written_only_where_it_is_asked_for(device: Any) -> None:
    for make in (layer_norm(device), group_norm(device)):
        (y, _), (launch,) = make()
        assert launch.arguments["h"] is not None
        (launch,) = make(torch.empty_like(y))[1]
        assert launch.arguments["h"] is None
