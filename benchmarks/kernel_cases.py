"""The shapes that the kernels are judged by: layers of MONAI's brain LDM, BraTS and MAISI networks, in float16.

A case makes its tensors on any device; on `meta` they have shapes and no memory, which is enough to compile for a GPU
that is not here. Peers are the ways in which a PyTorch user would write the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from volcast.kernels.attention import attention
from volcast.kernels.group_norm import group_norm
from volcast.kernels.input_head import input_head
from volcast.kernels.layer_norm import add_layer_norm, layer_norm
from volcast.kernels.output_head import output_head
from volcast.kernels.pointwise import pointwise
from volcast.kernels.sampler_step import plan_table, sampler_step, step_counter
from volcast.kernels.upsample_convolution import phase_weights, upsample_convolution

HALF = torch.float16
META = torch.device("meta")
Call = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call must at least do: bytes of device memory, floating-point operations (a multiply-add is two) of
    the tensor cores, and results of the special function unit (exponentials, reciprocals)."""

    bytes: int
    flops: int = 0
    special: int = 0

    def roofline_ms(self) -> float:
        """The largest of the three at an H100's practical peaks: 3.0 TB/s, 798 TFLOP/s, 3.7e12 special a second."""
        return 1e3 * max(self.bytes / 3.0e12, self.flops / 798e12, self.special / 3.7e12)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`reach_ms` is the target on one H100. `subject(device)` gives the fused call and its peers, by name.

    The first peer computes the same, to the rounding of `comparable`; None: the peers draw their own noise.
    """

    name: str
    operation: str
    reach_ms: float | None
    cost: Cost
    subject: Callable[[torch.device], tuple[Call, dict[str, Call]]]
    launches: Callable[[int], list[Any]]  # by compute capability, from tensors on `meta`
    comparable: float | None = 1e-2  # relative L2


def volume(device: torch.device, *shape: int) -> Tensor:
    n, c, *spatial = shape
    return torch.randn((n, *spatial, c), dtype=HALF, device=device).movedim(-1, 1)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _norm(channels: int, *spatial: int, reach: float) -> Case:
    voxels = torch.Size(spatial).numel()

    def subject(device: torch.device) -> tuple[Call, dict[str, Call]]:
        x = volume(device, 1, channels, *spatial)
        weight, bias = torch.randn(2, channels, device=device).to(HALF)

        def eager(v: Tensor) -> Tensor:
            return F.silu(F.group_norm(v, 32, weight, bias, 1e-6))

        compiled, planar = torch.compile(eager, dynamic=False), x.contiguous()
        return lambda: group_norm(x, 32, weight, bias, activation="silu"), {
            "PyTorch, NDHWC": lambda: eager(x),
            "PyTorch, NCDHW": lambda: eager(planar),
            "torch.compile, NDHWC": lambda: compiled(x),
            "copy_ of one tensor": lambda: torch.empty_like(x).copy_(x),
        }

    def launches(capability: int) -> list[Any]:
        from volcast.kernels.group_norm_triton import group_norm_launches

        x, affine = volume(META, 1, channels, *spatial), empty(channels)
        return group_norm_launches(x, 32, affine, affine, 1e-6, "silu", None, None, None)[2]

    elements = channels * voxels
    return Case(
        name=f"GroupNorm + SiLU, {channels} ch @ {_times(spatial)}", operation="group_norm", reach_ms=reach,
        cost=Cost(bytes=6 * elements, special=2 * elements), subject=subject, launches=launches,
    )  # fmt: skip


def _output_head(channels: int, out: int, *spatial: int, reach: float) -> Case:
    voxels = torch.Size(spatial).numel()

    def subject(device: torch.device) -> tuple[Call, dict[str, Call]]:
        x = volume(device, 1, channels, *spatial)
        norm_weight, norm_bias = torch.randn(2, channels, device=device).to(HALF)
        weight = torch.randn(out, channels, 3, 3, 3, device=device).to(HALF) / channels**0.5
        bias = torch.randn(out, device=device).to(HALF)
        last = weight.contiguous(memory_format=torch.channels_last_3d)

        def eager(v: Tensor) -> Tensor:
            return F.conv3d(F.silu(F.group_norm(v, 32, norm_weight, norm_bias, 1e-6)), last, bias, padding=1)

        def convolution_alone() -> Tensor:
            return F.conv3d(x, last, bias, padding=1)

        compiled = torch.compile(eager, dynamic=False)
        return lambda: output_head(x, 32, norm_weight, norm_bias, weight, bias), {
            "PyTorch, NDHWC": lambda: eager(x),
            "torch.compile, NDHWC": lambda: compiled(x),
            "its convolution alone, cuDNN": convolution_alone,
        }

    def launches(capability: int) -> list[Any]:
        from volcast.kernels.output_head_triton import output_head_launches

        x, affine = volume(META, 1, channels, *spatial), empty(channels)
        weight = empty(out, channels, 3, 3, 3, dtype=HALF)
        return output_head_launches(x, 32, affine, affine, weight, empty(out), 1e-6, "silu")[1]

    return Case(
        name=f"GroupNorm + SiLU + {channels}->{out} conv @ {_times(spatial)}", operation="output_head",
        reach_ms=reach, cost=Cost(bytes=voxels * (4 * channels + 2 * out), flops=54 * channels * out * voxels,
        special=2 * channels * voxels), subject=subject, launches=launches,
    )  # fmt: skip


def _input_head(channels: int, out: int, *spatial: int) -> Case:
    voxels = torch.Size(spatial).numel()

    def subject(device: torch.device) -> tuple[Call, dict[str, Call]]:
        x = volume(device, 1, channels, *spatial)
        weight = torch.randn(out, channels, 3, 3, 3, device=device).to(HALF)
        bias = torch.randn(out, device=device).to(HALF)
        last = weight.contiguous(memory_format=torch.channels_last_3d)
        return lambda: input_head(x, weight, bias), {
            "cuDNN, NDHWC": lambda: F.conv3d(x, last, bias, padding=1),
            "cuDNN, NCDHW": lambda: F.conv3d(x.contiguous(), weight, bias, padding=1),
        }

    def launches(capability: int) -> list[Any]:
        from volcast.kernels.input_head_triton import input_head_launches

        x = volume(META, 1, channels, *spatial)
        return input_head_launches(x, empty(out, channels, 3, 3, 3, dtype=HALF), empty(out))[1]

    return Case(
        name=f"{channels}->{out} conv @ {_times(spatial)}", operation="input_head", reach_ms=None,
        cost=Cost(bytes=2 * voxels * (channels + out), flops=54 * channels * out * voxels), subject=subject,
        launches=launches,
    )  # fmt: skip


def _upsample(channels: int, *spatial: int, reach: float) -> Case:
    voxels = torch.Size(spatial).numel()

    def subject(device: torch.device) -> tuple[Call, dict[str, Call]]:
        x = volume(device, 1, channels, *spatial)
        weight = torch.randn(channels, channels, 3, 3, 3, device=device).to(HALF) / channels**0.5
        bias = torch.randn(channels, device=device).to(HALF)
        packed = phase_weights(weight)
        last = weight.contiguous(memory_format=torch.channels_last_3d)

        def eager(v: Tensor) -> Tensor:
            return F.conv3d(F.interpolate(v, scale_factor=2.0, mode="nearest"), last, bias, padding=1)

        compiled = torch.compile(eager, dynamic=False)
        return lambda: upsample_convolution(x, packed, bias), {
            "PyTorch, NDHWC": lambda: eager(x),
            "torch.compile, NDHWC": lambda: compiled(x),
        }

    def launches(capability: int) -> list[Any]:
        from volcast.kernels.upsample_convolution_triton import upsample_convolution_launches

        x = volume(META, 1, channels, *spatial)
        weights = empty(8, 8, channels, channels, dtype=HALF)
        return upsample_convolution_launches(x, weights, empty(channels), capability)[1]

    return Case(
        name=f"nearest x2 + {channels}->{channels} conv to {_times([2 * size for size in spatial])}",
        operation="upsample_convolution", reach_ms=reach,
        cost=Cost(bytes=2 * channels * voxels * 9, flops=2 * 64 * channels**2 * voxels), subject=subject,
        launches=launches,
    )  # fmt: skip


def _attention(heads: int, width: int, length: int, reach: float) -> Case:
    def subject(device: torch.device) -> tuple[Call, dict[str, Call]]:
        q, k, v = torch.randn(3, 1, length, heads, width, device=device).to(HALF).transpose(2, 3)
        return lambda: attention(q, k, v, impl="triton"), {
            "SDPA": lambda: F.scaled_dot_product_attention(q, k, v)
        }

    def launches(capability: int) -> list[Any]:
        from volcast.kernels.attention_triton import attention_launches

        q = empty(1, length, heads, width, dtype=HALF).transpose(1, 2)
        return attention_launches(q, q, q, width**-0.5)[1]

    return Case(
        name=f"attention, {heads} x {width}, L={length}", operation="attention", reach_ms=reach,
        cost=Cost(bytes=8 * heads * width * length, flops=4 * heads * width * length**2,
                  special=heads * length**2), subject=subject, launches=launches,
    )  # fmt: skip


def _layer_norm(channels: int, length: int, *, added: bool) -> Case:
    """A norm of tokens; `added`: of the product before it, its bias and the residual, which come out as well."""

    def subject(device: torch.device) -> tuple[Call, dict[str, Call]]:
        x, residual = torch.randn(2, 1, length, channels, device=device).to(HALF)
        weight, bias, shift = torch.randn(3, channels, device=device).to(HALF)

        def eager(v: Tensor) -> tuple[Tensor, Tensor]:
            h = v + shift + residual if added else v
            return F.layer_norm(h, (channels,), weight, bias, 1e-5), h

        def fused() -> Tensor:
            if added:
                return add_layer_norm(x, weight, bias, shift=shift, residual=residual)[0]
            return layer_norm(x, weight, bias)

        compiled = torch.compile(eager, dynamic=False)
        return fused, {"PyTorch": lambda: eager(x)[0], "torch.compile": lambda: compiled(x)[0]}

    def launches(capability: int) -> list[Any]:
        from volcast.kernels.layer_norm_triton import layer_norm_launches

        x, vector = empty(1, length, channels, dtype=HALF), empty(channels)
        before = (vector, torch.empty_like(x)) if added else (None, None)
        return layer_norm_launches(x, vector, vector, 1e-5, *before)[2]

    return Case(
        name=f"{'bias + residual + ' if added else ''}LayerNorm, {channels} ch, L={length}", operation="layer_norm",
        reach_ms=None, cost=Cost(bytes=(8 if added else 4) * channels * length), subject=subject, launches=launches,
    )  # fmt: skip


def _gate(channels: int, length: int) -> Case:
    """A transformer's gate: one half of a product's columns times GELU of the other, read where they lie."""
    program = '[["gelu", 0], ["mul", 1, 2]]'

    def subject(device: torch.device) -> tuple[Call, dict[str, Call]]:
        value, gate = torch.randn(1, length, 2 * channels, device=device).to(HALF).chunk(2, -1)

        def eager(a: Tensor, b: Tensor) -> Tensor:
            return a * F.gelu(b)

        compiled = torch.compile(eager, dynamic=False)
        return lambda: pointwise([gate, value], program, [3])[0], {
            "PyTorch": lambda: eager(value, gate),
            "torch.compile": lambda: compiled(value, gate),
        }

    def launches(capability: int) -> list[Any]:
        from volcast.kernels.pointwise_triton import pointwise_launches

        value, gate = empty(1, length, 2 * channels, dtype=HALF).chunk(2, -1)
        return pointwise_launches([gate, value], program, [3])[1]

    elements = channels * length
    return Case(
        name=f"GELU gate, {channels} ch, L={length}", operation="pointwise", reach_ms=None,
        cost=Cost(bytes=6 * elements, special=elements), subject=subject, launches=launches,
    )  # fmt: skip


def _bias_residual(channels: int, *spatial: int) -> Case:
    """The end of a residual block: the product of its skip connection, that one's bias, the convolutions' result."""
    program = '[["add", 0, 1], ["add", 2, 3]]'

    def subject(device: torch.device) -> tuple[Call, dict[str, Call]]:
        x, residual = (volume(device, 1, channels, *spatial) for _ in range(2))
        bias = torch.randn(channels, device=device).to(HALF)

        def eager(a: Tensor, b: Tensor) -> Tensor:
            return b + (a + bias[:, None, None, None])

        compiled = torch.compile(eager, dynamic=False)
        return lambda: pointwise([x, bias, residual], program, [4])[0], {
            "PyTorch, NDHWC": lambda: eager(x, residual),
            "torch.compile, NDHWC": lambda: compiled(x, residual),
        }

    def launches(capability: int) -> list[Any]:
        from volcast.kernels.pointwise_triton import pointwise_launches

        x, residual = (volume(META, 1, channels, *spatial) for _ in range(2))
        return pointwise_launches([x, empty(channels), residual], program, [4])[1]

    return Case(
        name=f"bias + residual, {channels} ch @ {_times(spatial)}", operation="pointwise", reach_ms=None,
        cost=Cost(bytes=6 * channels * torch.Size(spatial).numel()), subject=subject, launches=launches,
    )  # fmt: skip


def _sampler_step(channels: int, *spatial: int) -> Case:
    """One stochastic DDIM step with guidance, the network in float16."""

    def tensors(device: torch.device) -> dict[str, Any]:
        x = volume(device, 1, channels, *spatial).float()
        rows = np.zeros(1, [*((name, "f8") for name in ("a", "d", "p", "q", "lo", "hi", "e", "c")), ("b", "f8", 3),
                            ("read", "i4", 3), ("write", "i4"), ("from_saved", "?"), ("save", "?")])  # fmt: skip
        rows["a"], rows["d"], rows["c"], rows["read"], rows["write"] = 0.99, -0.1, 0.05, -1, -1
        one = torch.ones(1, dtype=torch.int64, device=device)
        return {
            "x": x, "out": x.half(), "uncond": x.half(), "guidance": one.double(), "network_input": x.half(),
            "table": plan_table(rows, device), "counter": step_counter(1, device), "seeds": one, "samples": one,
        }  # fmt: skip

    def subject(device: torch.device) -> tuple[Call, dict[str, Call]]:
        given = tensors(device)
        state: Tensor = given["x"]
        x, out, uncond, shown = (torch.clone(given[name]) for name in ("x", "out", "uncond", "network_input"))
        fresh = given["counter"].clone()

        def fused() -> Tensor:
            given["counter"].copy_(fresh)
            sampler_step(**given)
            return state

        def eager() -> Tensor:
            given["counter"].copy_(fresh)
            guided = uncond.float() + 1.0 * (out.float() - uncond.float())
            x.copy_(0.99 * x - 0.1 * guided + 0.05 * torch.randn_like(x))
            shown.copy_(x)
            return x

        return fused, {"PyTorch": eager, "torch.compile": torch.compile(eager, dynamic=False)}

    def launches(capability: int) -> list[Any]:
        from volcast.kernels.sampler_step_triton import sampler_step_launches

        x = volume(META, 1, channels, *spatial).float()
        one = empty(1, dtype=torch.int64)
        weights, slots = empty(1, 11, dtype=torch.float64), empty(1, 6, dtype=torch.int32)
        return sampler_step_launches(x, x.half(), x.half(), one.double(), None, None, x.half(), weights, slots,
                                     empty(3, dtype=torch.int32), one, one)  # fmt: skip

    elements = channels * torch.Size(spatial).numel()
    return Case(
        name=f"guidance + DDIM row + noise, {channels} ch @ {_times(spatial)}", operation="sampler_step",
        reach_ms=None, cost=Cost(bytes=14 * elements), subject=subject, launches=launches,
        comparable=None,
    )  # fmt: skip


def _times(sizes: Any) -> str:
    return "x".join(map(str, sizes))


CASES = (
    _norm(64, 160, 224, 160, reach=0.85),
    _norm(256, 20, 28, 20, reach=0.008),
    _norm(512, 10, 14, 10, reach=0.005),
    _output_head(64, 1, 160, 224, 160, reach=0.65),
    _output_head(256, 3, 20, 28, 20, reach=0.012),
    _upsample(128, 80, 112, 80, reach=3.2),
    _attention(1, 512, 1400, reach=0.040),
    _attention(1, 768, 175, reach=0.012),
    _attention(8, 32, 32768, reach=3.0),
    _input_head(1, 64, 160, 224, 160),
    _layer_norm(512, 1400, added=False),
    _layer_norm(512, 1400, added=True),
    _gate(2048, 1400),
    _bias_residual(64, 160, 224, 160),
    _sampler_step(8, 36, 44, 28),
)
