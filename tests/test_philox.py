"""kernels/philox, both forms: the bits of csrc's Philox, and normals that round to csrc's float32 values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from volcast import _core
from volcast.kernels import philox, philox_triton

SEEDS, SAMPLES = np.array([7, 2**63 + 5], np.uint64), np.array([2**40 + 1, 3], np.uint64)
MAX32 = 0xFFFFFFFF


def identity(values: np.ndarray, device: Any = "cpu") -> Tensor:
    return torch.from_numpy(values.view(np.int64).copy()).to(device)


def bits(x: Tensor | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.numpy() if isinstance(x, Tensor) else x).view(np.int32)


@triton.jit
def _bits(out, seed, sample, step: tl.int32, first: tl.int64, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    r0, r1, r2, r3 = philox_triton.philox_bits(tl.load(seed), tl.load(sample), step, first + at)
    tl.store(out + at * 4, r0.to(tl.int64))
    tl.store(out + at * 4 + 1, r1.to(tl.int64))
    tl.store(out + at * 4 + 2, r2.to(tl.int64))
    tl.store(out + at * 4 + 3, r3.to(tl.int64))


@pytest.mark.parametrize(
    ("seed", "sample", "step", "first"),
    [
        (0, 0, 0, 0),  # Random123's first known answer, which test_noise.py checks of _core
        (2**64 - 1, 2**64 - 1, 2**31 - 1, 2**32 - 8),  # every word at its largest
        (0xA4093822299F31D0, 0x1319_8A2E_0370_7344, 5, 12345),
    ],
)
def test_philox_bits_are_those_of_csrc(seed: int, sample: int, step: int, first: int, device: Any) -> None:
    key = [seed & MAX32, seed >> 32]
    wanted = [
        _core.philox([block, step, sample & MAX32, sample >> 32], key) for block in range(first, first + 8)
    ]
    ids = [identity(np.array([value], np.uint64), device) for value in (seed, sample)]
    found = torch.empty(8, 4, dtype=torch.int64, device=device)
    _bits[(1,)](found, *ids, step, first, 8)
    assert found.tolist() == wanted
    words = [torch.tensor([value]) for value in (step, sample & MAX32, sample >> 32)]
    eager = philox.philox([torch.arange(first, first + 8), *words], [torch.tensor([word]) for word in key])
    assert torch.stack(eager, 1).tolist() == wanted


@triton.jit
def _pairs(out, r0, r1, size: tl.int32, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    cos, sin = philox_triton.box_muller(tl.load(r0 + at).to(tl.uint32), tl.load(r1 + at).to(tl.uint32))
    tl.store(out + at, cos)
    tl.store(out + size + at, sin)


def test_box_muller(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    """The same bits in both forms, given the same square root; next to numpy's functions, a few ulp of float64."""
    torch.manual_seed(0)
    edges = torch.tensor([0, 1, 2**29 - 1, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 1])
    r0 = torch.cat([torch.randint(0, 2**32, (2**15 - 100,)), edges.repeat_interleave(10)])
    r1 = torch.cat([torch.randint(0, 2**32, (2**15 - 100,)), edges.repeat(10)])
    found = torch.empty(2, 2**15, dtype=torch.float64, device=device)
    _pairs[(32,)](found, r0.to(device), r1.to(device), 2**15, 2**10, enable_fp_fusion=False)
    # PyTorch's square root of float64 on a CPU may be off by an ulp, numpy's is IEEE's.
    monkeypatch.setattr(torch, "sqrt", lambda value: torch.from_numpy(np.sqrt(value.numpy())))
    assert torch.equal(found.cpu(), torch.stack(philox._box_muller(r0, r1)))
    u, angle = ((r.double().numpy() + 0.5) * 2.0**-32 for r in (r0, r1))
    radius = np.sqrt(-2 * np.log(u))
    for ours, function in zip(found.cpu().numpy(), (np.cos, np.sin), strict=True):
        theirs = radius * function(2 * np.pi * angle)
        assert (np.abs(ours - theirs) <= 4 * np.spacing(np.abs(theirs))).all()


@pytest.mark.parametrize("count", [1, 3, 4, 257])
def test_normals_are_those_of_csrc(count: int) -> None:
    found = philox.standard_normal(identity(SEEDS), identity(SAMPLES), 9, count)
    wanted = _core.normal(SEEDS, SAMPLES, 9, [count], np.dtype("f8"))
    assert (np.abs(found.numpy() - wanted) <= 4 * np.spacing(np.abs(wanted))).all()
    np.testing.assert_array_equal(bits(found.float()), bits(wanted.astype("f4")))


def test_normals_round_as_csrc_s_do() -> None:
    """The rate of other float32 values that `standard_normal` claims, from the mean difference in float64."""
    count = 1 << 17
    found = philox.standard_normal(identity(SEEDS), identity(SAMPLES), 1, count).numpy()
    wanted = _core.normal(SEEDS, SAMPLES, 1, [count], np.dtype("f8"))
    rate = np.mean(np.abs(found - wanted) / np.spacing(np.abs(wanted))) / 2**29
    assert rate < 1e-9
    assert np.sum(found.astype("f4") != wanted.astype("f4")) <= 1
