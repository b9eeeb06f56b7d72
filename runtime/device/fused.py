"""The fused forms of a device program's operations: launches and library calls that write where they are told to.

What has no entry in `FORMS` runs as it is defined and is copied. cuDNN picks by rules, never by timing: the same shapes
have the same bits in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from volcast.kernels.attention_triton import attention_launches
from volcast.kernels.configuration import configuration
from volcast.kernels.group_norm_triton import group_norm_launches
from volcast.kernels.input_head_triton import input_head_launches
from volcast.kernels.launch_triton import Launch, run
from volcast.kernels.layer_norm_triton import layer_norm_launches
from volcast.kernels.output_head_triton import output_head_launches
from volcast.kernels.pointwise_triton import pointwise_launches
from volcast.kernels.upsample_convolution_triton import upsample_convolution_launches

from .operations import Values, dense
from .program import DeviceProgram, Operation

CUDNN_LIMIT = 2**31 - 1
"""Elements of a tensor: cuDNN counts them in 32 bits."""

_ADD = '[["add",0,1]]'

Settings = Mapping[str, Any]


def pack(program: DeviceProgram, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as the fused forms read them: convolutions' channels last, linears' biases in their dtype. What is
    so already is not copied."""
    packed = {name: weights[name] for name in program.weights() if name in weights}
    readers: dict[str, set[str]] = {}
    for operation in program.operations:
        for place, name in enumerate(operation.inputs):
            if name is not None:
                readers.setdefault(name, set()).add(f"{operation.kind} {place}")
    for operation in program.operations:
        if operation.kind in ("convolution", "transposed_convolution") and operation.inputs[1] in packed:
            name = operation.inputs[1]
            packed[name] = dense(packed[name])
        if operation.kind == "linear" and len(operation.inputs) > 2 and operation.inputs[2] in packed:
            weight, name = operation.inputs[1:3]
            assert name is not None
            if weight in packed and readers[name] == {"linear 2"}:
                packed[name] = packed[name].to(packed[weight].dtype)
    return packed


def launches(operation: Operation, inputs: Values, outputs: Sequence[Tensor]) -> list[Launch] | None:
    """The Triton launches of an operation; None where its form is another. On `meta` tensors: their description."""
    make = _LAUNCHES.get(operation.kind)
    return None if make is None else make(list(inputs), operation.settings, list(outputs))


def scratch_bytes(operation: Operation, inputs: Values, outputs: Sequence[Tensor]) -> int:
    """What a run of the operation takes beside its outputs, and gives back. Without cuDNN's own workspace."""
    read = [None if x is None else _described(x) for x in inputs]
    written = [_described(y) for y in outputs]
    found = launches(operation, read, written)
    if found is None:
        in_place = operation.kind in ("cast", "concat", "convolution", "linear")
        return 0 if in_place else sum(y.numel() * y.itemsize for y in outputs)
    known = {x.untyped_storage()._cdata for x in [*read, *written] if x is not None}
    made = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for launch in found
        for value in launch.arguments.values()
        if isinstance(value, Tensor)
    }
    return sum(size for storage, size in made.items() if storage not in known)


def _described(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _pointwise(i: list[Any], s: Settings, o: list[Tensor]) -> list[Launch]:
    return pointwise_launches(i, s["program"], s["results"], o)[1]


def _group_norm(i: list[Any], s: Settings, o: list[Tensor]) -> list[Launch]:
    x, weight, bias, shift, residual, second = (*i, None, None, None)[:6]
    out, sum_out = (*o, None)[:2]
    return group_norm_launches(
        x, s["groups"], weight, bias, s["eps"], s["activation"], shift, residual, second, out=out, sum_out=sum_out
    )[2]  # fmt: skip


def _layer_norm(i: list[Any], s: Settings, o: list[Tensor]) -> list[Launch]:
    x, weight, bias, shift, residual = (*i, None, None)[:5]
    out, sum_out = (*o, None)[:2]
    return layer_norm_launches(x, weight, bias, s["eps"], shift, residual, out=out, sum_out=sum_out)[2]


def _input_head(i: list[Any], s: Settings, o: list[Tensor]) -> list[Launch]:
    return input_head_launches(*i, out=o[0])[1]


def _output_head(i: list[Any], s: Settings, o: list[Tensor]) -> list[Launch]:
    x, scale, offset, weight, bias = i
    return output_head_launches(
        x, s["groups"], scale, offset, weight, bias, s["eps"], s["activation"], out=o[0]
    )[1]


def _upsample_convolution(i: list[Any], s: Settings, o: list[Tensor]) -> list[Launch]:
    x, weights, bias = (*i, None)[:3]
    return upsample_convolution_launches(x, weights, bias, out=o[0])[1]


def _attention(i: list[Any], s: Settings, o: list[Tensor]) -> list[Launch] | None:
    q, k, v, out = _heads([*i, o[0]], s["heads"])
    if _handed_over(q):
        return None
    return attention_launches(q, k, v, _scale(q, s), out=out)[1]


def _heads(tokens: Sequence[Tensor], heads: int) -> list[Tensor]:
    """Views `N H L D` of tokens `N L H*D`."""
    return [x.view(*x.shape[:-1], heads, -1).transpose(1, 2) for x in tokens]


def _handed_over(q: Tensor) -> bool:
    return bool(configuration("attention_hand_over", q.dtype, q.shape[-1])["sdpa"])


def _scale(q: Tensor, s: Settings) -> float:
    return float(q.shape[-1] ** -0.5 if s["scale"] is None else s["scale"])


_LAUNCHES: dict[str, Callable[[list[Any], Settings, list[Tensor]], list[Launch] | None]] = {
    "attention": _attention,
    "group_norm": _group_norm,
    "input_head": _input_head,
    "layer_norm": _layer_norm,
    "output_head": _output_head,
    "pointwise": _pointwise,
    "upsample_convolution": _upsample_convolution,
}


def run_launches(operation: Operation, inputs: Values, outputs: list[Tensor]) -> None:
    """The form of what is Triton launches."""
    found = launches(operation, inputs, outputs)
    assert found is not None
    run(found, outputs[0].device)


def attention(operation: Operation, inputs: Values, outputs: list[Tensor]) -> None:
    """Ours, or PyTorch's where the table says that it is the faster one."""
    found = launches(operation, inputs, outputs)
    if found is not None:
        run(found, outputs[0].device)
        return
    q, k, v, out = _heads([x for x in [*inputs, outputs[0]] if x is not None], operation.settings["heads"])
    out.copy_(F.scaled_dot_product_attention(q, k, v, scale=_scale(q, operation.settings)))


def linear(operation: Operation, inputs: Values, outputs: list[Tensor]) -> None:
    """One product over rows of channels; the bias or the residual is its addend."""
    x, weight, bias, residual = (*inputs, None, None)[:4]
    assert x is not None and weight is not None
    rows, out = _rows(x), _rows(outputs[0])
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if residual is not None:
        addend = _rows(residual)
        if addend.data_ptr() == out.data_ptr():
            out.addmm_(rows, weight)
        else:
            torch.addmm(addend, rows, weight, out=out)
        if bias is not None:
            _add(out, bias)
    elif bias is not None:
        torch.addmm(bias, rows, weight, out=out)
    else:
        torch.mm(rows, weight, out=out)


def _rows(x: Tensor) -> Tensor:
    """`[rows, C]`, a view."""
    lines = x.movedim(1, -1) if x.ndim >= 4 else x
    return lines.view(-1, lines.shape[-1])


def _add(y: Tensor, bias: Tensor) -> None:
    """y += bias `[C]`, in place."""
    run(pointwise_launches([y, bias], _ADD, [2], [y])[1], y.device)


def cast(operation: Operation, inputs: Values, outputs: list[Tensor]) -> None:
    x = inputs[0]
    assert x is not None
    outputs[0].copy_(x)


def concat(operation: Operation, inputs: Values, outputs: list[Tensor]) -> None:
    torch.cat([x for x in inputs if x is not None], operation.settings["axis"], out=outputs[0])


def convolution(operation: Operation, inputs: Values, outputs: list[Tensor]) -> None:
    """cuDNN's product, then the bias in place."""
    x, weight, bias = (*inputs, None)[:3]
    assert x is not None and weight is not None
    settings, (out,) = operation.settings, outputs
    if x.ndim == 3:  # an image of height 1
        settings = {**settings, **{name: [one, *settings[name]] for name, one in _ONE_ROW.items()}}
        convolve(x.unsqueeze(2), weight.unsqueeze(2), settings, out.unsqueeze(2))
    else:
        convolve(x, weight, settings, out)
    if bias is not None and x.ndim > 3:
        _add(out, bias)
    elif bias is not None:
        out.add_(bias.to(out.dtype)[:, None])


_ONE_ROW = {"stride": 1, "padding": 0, "dilation": 1}


def convolve(x: Tensor, weight: Tensor, settings: Settings, out: Tensor, limit: int = CUDNN_LIMIT) -> None:
    """out = convolution without bias, no call of the library on a tensor of more than `limit` elements.

    Past it sample by sample, and a sample in slabs along D, each read with its halo where it lies. Only the few rows
    whose taps reach into the padding are read through a copy.
    """
    if max(x.numel(), out.numel()) <= limit:
        _library_convolution(x, weight, settings, settings["padding"], out)
    elif x.shape[0] > 1:
        for sample in range(x.shape[0]):
            convolve(x[sample : sample + 1], weight, settings, out[sample : sample + 1], limit)
    else:
        for first, last in slabs(x, weight, settings, out, limit):
            _slab(x, weight, settings, out, first, last)


def slabs(
    x: Tensor, weight: Tensor, settings: Settings, out: Tensor, limit: int
) -> Iterator[tuple[int, int]]:
    """(first, last) rows of the result along D, last excluded; none mixes rows that reach into the padding with others."""
    stride, padding, reach = _along_depth(weight, settings)
    depth, rows = x.shape[2], out.shape[2]
    in_rows = limit // (x.numel() // depth)
    most = min(limit // (out.numel() // rows), (in_rows - reach - 1) // stride + 1)
    if most < 1 or in_rows <= reach:
        raise ValueError(
            f"[convolution] x {tuple(x.shape)}: {reach + 1} planes of it, or one of the result, have more than {limit} "
            "elements; make the volume smaller across D"
        )
    clean = min(-(-padding // stride), rows)
    dirty = max(clean, min((depth - 1 + padding - reach) // stride + 1, rows))
    for begin, end in ((0, clean), (clean, dirty), (dirty, rows)):
        for first in range(begin, end, most):
            yield first, min(first + most, end)


def _slab(x: Tensor, weight: Tensor, settings: Settings, out: Tensor, first: int, last: int) -> None:
    stride, padding, reach = _along_depth(weight, settings)
    begin, end = first * stride - padding, (last - 1) * stride - padding + reach + 1
    low, high = (min(max(side, 0), end - begin) for side in (-begin, end - x.shape[2]))
    part = x[:, :, begin + low : end - high]
    if low or high:
        part = dense(F.pad(part, [0, 0] * (x.ndim - 3) + [low, high]))
    _library_convolution(part, weight, settings, [0, *settings["padding"][1:]], out[:, :, first:last])


def _along_depth(weight: Tensor, settings: Settings) -> tuple[int, int, int]:
    """(stride, padding, reach): a row reads rows from its first to `reach` further."""
    reach = settings["dilation"][0] * (weight.shape[2] - 1)
    return settings["stride"][0], settings["padding"][0], reach


def _library_convolution(
    x: Tensor, weight: Tensor, settings: Settings, padding: Sequence[int], out: Tensor
) -> None:
    stride, dilation, groups = settings["stride"], settings["dilation"], settings["groups"]
    if x.is_cuda:
        # No timing run, deterministic, TF32 where the inputs are float32.
        torch.ops.aten.cudnn_convolution.out(
            x, weight, padding, stride, dilation, groups, False, True, True, out=out
        )
    else:
        out.copy_(
            torch.convolution(x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)
        )


def transposed_convolution(operation: Operation, inputs: Values, outputs: list[Tensor]) -> None:
    """cuDNN's, copied: it has no form that writes elsewhere."""
    x, weight, bias = (*inputs, None)[:3]
    assert x is not None and weight is not None
    s, (out,) = operation.settings, outputs
    geometry = (s["padding"], s["output_padding"], s["stride"], s["dilation"], s["groups"])
    if x.is_cuda:
        y = torch.ops.aten.cudnn_convolution_transpose(x, weight, *geometry, False, True, True)
    else:
        padding, more, stride, dilation, groups = geometry
        y = torch.convolution(x, weight, None, stride, padding, dilation, True, more, groups)
    out.copy_(y)
    if bias is not None:
        _add(out, bias)


FORMS: dict[str, Callable[[Operation, Values, list[Tensor]], None]] = {
    **dict.fromkeys(_LAUNCHES, run_launches),
    "attention": attention,
    "cast": cast,
    "concat": concat,
    "convolution": convolution,
    "linear": linear,
    "transposed_convolution": transposed_convolution,
}
