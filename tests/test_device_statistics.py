"""Group statistics over slabs: NumPy's in float64, whatever the slabs and the mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate, volume
from hypothesis import given, settings
from hypothesis import strategies as st

from volcast.runtime.device import statistics
from volcast.runtime.device.statistics import RowMoments, center_and_scale

EPS = 1e-6


def moments(x: torch.Tensor, height: int) -> RowMoments:
    found = RowMoments(x.shape, x.device)
    for start in range(0, x.shape[2], height):
        found.add(x[:, :, start : start + height], start)
    return found


def exact(x: torch.Tensor, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the groups, float64 `[N, groups]`."""
    grouped = x.double().numpy().reshape(x.shape[0], groups, -1)
    return grouped.mean(-1), np.sqrt(grouped.var(-1) + EPS)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from([(1, 8, 5, 4, 3), (2, 8, 1, 3, 2), (2, 4, 7, 1, 1), (1, 8, 9, 5), (2, 4, 3, 1)]),
    height=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    ratio=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_heights_and_dtypes(shape: tuple[int, ...], height: int, dtype: torch.dtype, ratio: float) -> None:
    torch.manual_seed(0)
    x = volume(*shape, dtype=dtype, device=torch.device("cpu"), mean=ratio)
    weight = torch.rand(shape[1]) + 0.5
    center, scale = center_and_scale([moments(x, height)], None, 2, weight, EPS)
    mean, deviation = exact(x, 2)
    # float64 up to the rows' own moments, which are rounded to float32: 2^-24 of each value, and so of their mean.
    unit = 2.0**-23
    wide = np.repeat(mean, shape[1] // 2, 1)
    assert np.all(abs(center.numpy() - wide) <= unit * abs(x).max().item())
    # The rounding of the row's means enters the variance as its square, that of the variances by half its share.
    expected = weight.double().numpy() / np.repeat(deviation, shape[1] // 2, 1)
    slack = 2 * unit + (unit * abs(x).max().item() / np.repeat(deviation, shape[1] // 2, 1)) ** 2
    # What the rows have in common cancels in E[(mean_r - mean)^2]: each deviation carries the rounding of a mean.
    slack = slack + unit * abs(x).max().item() / np.repeat(deviation, shape[1] // 2, 1)
    assert np.all(abs(scale.numpy() - expected) <= slack * abs(expected))


@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_a_mean_far_larger_than_the_deviation(ratio: float) -> None:
    """E[x^2] - mean^2 in float32 would lose all of it."""
    torch.manual_seed(1)
    x = volume(1, 4, 12, 16, 16, dtype=torch.float32, device=torch.device("cpu"), mean=ratio)
    _, scale = center_and_scale([moments(x, 5)], None, 2, torch.ones(4), EPS)
    _, deviation = exact(x, 2)
    assert np.allclose(1 / scale.numpy(), np.repeat(deviation, 2, 1), rtol=2.0**-22 * ratio**0.5, atol=0)
    naive = (x.reshape(1, 2, -1).square().mean(-1) - x.reshape(1, 2, -1).mean(-1).square()).abs().sqrt()
    if ratio == 1e4:
        assert not np.allclose(naive.numpy(), deviation, rtol=0.1)


def test_the_same_bits_whatever_the_slabs() -> None:
    torch.manual_seed(2)
    x = volume(2, 8, 13, 6, 5, dtype=torch.float32, device=torch.device("cpu"))
    whole = moments(x, 13)
    for height in range(1, 13):
        part = moments(x, height)
        assert torch.equal(part.mean, whole.mean) and torch.equal(part.variance, whole.variance)


@pytest.mark.parametrize("blocks", [1, 2**24])
def test_parts_shift_and_groups_over_the_border(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Six groups over 8 + 4 channels: the border lies in none, over 3 groups in one."""
    monkeypatch.setattr(statistics, "_BLOCK", blocks)
    torch.manual_seed(3)
    cpu = torch.device("cpu")
    x = volume(2, 8, 5, 4, 3, dtype=torch.float32, device=cpu, mean=2)
    second = volume(2, 4, 5, 4, 3, dtype=torch.float32, device=cpu, mean=-1, std=3)
    shift, weight, bias = torch.randn(2, 8), torch.rand(12) + 0.5, torch.randn(12)
    for groups in (3, 6):
        parts = [moments(x, 2), moments(second, 3)]
        center, scale = center_and_scale(parts, shift, groups, weight, EPS)
        v = torch.cat([x, second], 1)
        y = (v - center[..., None, None, None]) * scale[..., None, None, None] + bias[:, None, None, None]
        h = torch.cat([x + shift[..., None, None, None], second], 1)
        eager = torch.group_norm(h, groups, weight, bias, EPS)
        h64 = torch.cat([x.double() + shift.double()[..., None, None, None], second.double()], 1)
        assert_as_accurate(y, eager, torch.group_norm(h64, groups, weight.double(), bias.double(), EPS))


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 8)])
def test_shapes_of_a_shift(shape: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    x = volume(2, 8, 4, 3, 3, dtype=torch.float32, device=torch.device("cpu"))
    shift = torch.randn(shape)
    found = center_and_scale([moments(x, 2)], shift, 4, torch.ones(8), EPS)
    added = (shift.expand(2, 8))[..., None, None, None]
    y = (x - found[0][..., None, None, None]) * found[1][..., None, None, None]
    wanted = torch.group_norm((x + added).double(), 4, None, None, EPS)
    assert (y.double() - wanted).abs().max() <= 2.0**-20 * wanted.abs().max()
