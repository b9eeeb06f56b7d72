"""The one tolerance policy for fused kernels: no worse than twice what PyTorch loses in the same precision."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(fused: Tensor, eager: Tensor, exact: Tensor) -> None:
    """`exact` is the float64 result on the same quantised inputs; `eager` PyTorch's in the dtype of `fused`.

    max|fused - exact| <= 2 (max|eager - exact| + eps(dtype) max|exact|): one rounding band besides, since eager may be
    exact by luck.
    """
    assert fused.dtype == eager.dtype and exact.dtype == torch.float64
    assert fused.shape == eager.shape == exact.shape
    assert exact.abs().max() > 0, "a zero oracle proves nothing"
    error = (fused.double() - exact).abs().max()
    allowed = 2 * ((eager.double() - exact).abs().max() + torch.finfo(fused.dtype).eps * exact.abs().max())
    assert error <= allowed, f"fused error {error:.3g}, allowed {allowed:.3g}"


def volume(*shape: int, dtype: torch.dtype, device: torch.device, mean: float = 0, std: float = 1) -> Tensor:
    """Random `N C *spatial`, channels last, from the global generator."""
    n, c, *spatial = shape
    values = mean + std * torch.randn(n, *spatial, c)
    return values.to(device=device, dtype=dtype).movedim(-1, 1)
