"""Which form of an operation runs. A form that was asked for by name runs or raises; nothing falls back."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor


class Impl(StrEnum):
    """`eager`: PyTorch operators, the definition of right. `triton`: the fused Triton-language kernels."""

    EAGER = "eager"
    TRITON = "triton"


def resolve_impl(operation: str, impl: Impl | str | None, x: Tensor, *parameters: Tensor | None) -> Impl:
    """The form to run for `x`; None: the fused one on a GPU, the eager one elsewhere.

    Raises ValueError for an unknown name, a GPU that is too old, fused kernels on a CPU outside the interpreter, or
    fused kernels asked for by name where a gradient is wanted: they have no backward.
    """
    named = impl is not None
    if impl is None:
        impl = Impl.TRITON if x.is_cuda else Impl.EAGER
    if impl not in set(Impl):
        raise ValueError(f"[{operation}] impl={impl!r}: need one of {', '.join(Impl)}")
    if Impl(impl) is Impl.TRITON:
        from .launch_triton import check_device

        wanted = any(tensor is not None and tensor.requires_grad for tensor in (x, *parameters))
        if named and wanted and torch.is_grad_enabled():
            raise ValueError(
                f"[{operation}] an input requires a gradient and impl='triton' has no backward: "
                "call it under torch.no_grad(), or pass impl='eager'"
            )
        check_device(operation, x.device)
    return Impl(impl)
