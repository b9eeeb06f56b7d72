"""A kernel launch as a value: run it now, or compile it ahead of time for a device that is not here.

Every fused form builds its launches with one function of its tensors; given tensors on the `meta` device the same
function describes what `compile_triton.py` has to compile. So there is one truth about constants and types.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

# Ampere: asynchronous copies and bfloat16 tensor cores, which every kernel here assumes.
OLDEST = (8, 0)


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` without specialisation on the numbers that vary from call to call.

    Otherwise a size that is 1 or a multiple of 16 compiles the kernel anew, in the first call that meets it, and to
    other code than the ahead-of-time cubin.
    """
    numbers = [
        name
        for name, annotation in function.__annotations__.items()
        if "constexpr" not in annotation and name != "return"
    ]
    return triton.jit(function, do_not_specialize=numbers)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a `triton.jit` kernel. `arguments` change from call to call, `constants` are compiled in.

    Numbers in `arguments` have their type from the kernel's annotation (`rows: tl.int64`); a None is a constant.
    `fuse_multiply_add=False` gives the bits of separately rounded operations.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 1
    fuse_multiply_add: bool = True

    def __post_init__(self) -> None:
        limits = (2**31 - 1, 65535, 65535)
        if any(not 1 <= size <= limit for size, limit in zip(self.grid, limits, strict=True)):
            raise ValueError(
                f"[{self.name}] needs a grid of {self.grid} programs, CUDA allows {limits}: "
                "give fewer samples, heads or groups a call"
            )

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def options(self) -> dict[str, Any]:
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": self.fuse_multiply_add,
        }

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options())


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the tensor descriptors that a kernel makes; PyTorch's blocks are aligned and freed in stream order."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run them in order on the current stream of `device`."""
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    triton.set_allocator(_scratch)  # per context: what one thread sets at import, another does not see
    with guard:
        for launch in launches:
            launch()


def check_device(operation: str, device: torch.device) -> None:
    """Raise ValueError where the fused kernels cannot run."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            name = torch.cuda.get_device_name(device)
            raise ValueError(
                f"[{operation}] {name} has compute capability {capability[0]}.{capability[1]}: "
                f"the fused kernels need {OLDEST[0]}.{OLDEST[1]} or newer; pass impl='eager'"
            )
    elif not (device.type == "cpu" and triton.knobs.runtime.interpret):
        raise ValueError(
            f"[{operation}] impl='triton' with a tensor on {device}: move it to a CUDA device, pass impl='eager', "
            "or set TRITON_INTERPRET=1 before the first import to interpret the kernels on a CPU"
        )
