"""Which form of an operation runs. A form that was asked for by name runs or raises; nothing falls back."""

from __future__ import annotations

from enum import StrEnum

from torch import Tensor


class Impl(StrEnum):
    """`eager`: PyTorch operators, the definition of right. `triton`: the fused Triton-language kernels."""

    EAGER = "eager"
    TRITON = "triton"


def resolve_impl(operation: str, impl: Impl | str | None, x: Tensor) -> Impl:
    """The form to run for `x`; None: the fused one on a GPU, the eager one elsewhere.

    Raises ValueError for an unknown name, a GPU that is too old, or fused kernels on a CPU outside the interpreter.
    """
    if impl is None:
        impl = Impl.TRITON if x.is_cuda else Impl.EAGER
    if impl not in set(Impl):
        raise ValueError(f"[{operation}] impl={impl!r}: need one of {', '.join(Impl)}")
    if Impl(impl) is Impl.TRITON:
        from .launch_triton import check_device

        check_device(operation, x.device)
    return Impl(impl)
