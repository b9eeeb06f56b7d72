"""Contracts: what an operation takes. Each failure names the operation, the value, and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_dtype(operation: str, **tensors: Tensor | None) -> None:
    """All tensors given share one of float32, float16, bfloat16."""
    given = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values()))
    if first not in FLOATS or len(set(given.values())) > 1:
        got = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in given.items())
        raise ValueError(f"[{operation}] dtype {got}: need one of float32, float16, bfloat16 for all of them")


def check_device_shared(operation: str, **tensors: Tensor | None) -> None:
    """All tensors given lie on one device."""
    given = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in given.items())
        raise ValueError(f"[{operation}] {got}: move them to one device")


def check_parameter(operation: str, name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """A contiguous parameter of the given shape, in float32 or the dtype of `x`."""
    check_shape(operation, name, tensor, shape)
    if tensor.dtype not in (torch.float32, x.dtype):
        got, same = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, x.dtype))
        raise ValueError(f"[{operation}] {name} has dtype {got}: need float32 or the input's {same}")
    if not tensor.is_contiguous():
        raise ValueError(f"[{operation}] {name} is not contiguous: call .contiguous() on it")


def check_shape(operation: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"[{operation}] {name} has shape {tuple(tensor.shape)}: need {shape}")


def check_volume(operation: str, name: str, x: Tensor) -> None:
    """A volume `N C D H W` or image `N C H W` without empty axes, channels last in memory (NDHWC, NHWC)."""
    if x.ndim not in (4, 5):
        raise ValueError(f"[{operation}] {name} has shape {tuple(x.shape)}: need N C H W or N C D H W")
    if 0 in x.shape:
        raise ValueError(f"[{operation}] {name} has shape {tuple(x.shape)}: an axis is empty")
    if not is_channels_last(x):
        layout = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
        raise ValueError(
            f"[{operation}] {name} of shape {tuple(x.shape)} has strides {x.stride()}: need channels last; "
            f"call .contiguous(memory_format={layout})"
        )


def is_channels_last(x: Tensor) -> bool:
    """`Tensor.is_contiguous(memory_format=...)`, but sure where an axis has size 1."""
    return x.movedim(1, -1).is_contiguous()


def channels_last(x: Tensor) -> Tensor:
    """x itself where it is channels last, else a copy that is, also where an axis has size 1."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def output_memory(operation: str, name: str, out: Tensor | None, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """Where a result goes: `out` if it is given, else new memory. Dense, in a volume channels last; dtype and device of `x`.

    Raises ValueError for an `out` that is not.
    """
    volume = len(shape) >= 4
    if out is None:
        return empty_channels_last(shape, x) if volume else x.new_empty(shape)
    check_shape(operation, name, out, shape)
    check_dtype(operation, x=x, **{name: out})
    check_device_shared(operation, x=x, **{name: out})
    if not (is_channels_last(out) if volume else out.is_contiguous()):
        lie = "channels last" if volume else "contiguous"
        raise ValueError(
            f"[{operation}] {name} of shape {shape} has strides {out.stride()}: need {lie} memory"
        )
    return out


def check_shift(operation: str, shift: Tensor, shape: tuple[int, int], x: Tensor) -> None:
    """A number per sample and channel `[N, C]`: contiguous rows, any distance apart."""
    check_shape(operation, "shift", shift, shape)
    check_parameter(operation, "shift", shift[0], shape[1:], x)


def sample_stride(vectors: Tensor | None, samples: int) -> int:
    """Elements from one sample's channels to the next one's, of `[N, C]`, `[1, C]` or `[C]`."""
    if vectors is None or vectors.ndim == 1 or vectors.shape[0] < samples:
        return 0
    return vectors.stride(0)


def empty_channels_last(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised `N C *spatial` tensor, channels last, with the dtype and device of `like`."""
    n, c, *spatial = shape
    return torch.empty((n, *spatial, c), dtype=like.dtype, device=like.device).movedim(-1, 1)
