"""What every kind of operation of a device program means: its eager definition in PyTorch.

Runs on any device and on `meta`, where it gives the shapes. The fused forms compute the same.

| kind | inputs | settings |
|---|---|---|
| convolution | x, weight `[Cout, Cin/groups, k..]`, bias? | stride, padding, dilation (one number an axis), groups |
| transposed_convolution | x, weight `[Cin, Cout, k..]`, bias? | stride, padding, dilation, output_padding, groups |
| input_head | x, weight, bias | |
| output_head | x, norm weight, norm bias, weight, bias | groups, eps, activation |
| upsample_convolution | x, weights of `phase_weights`, bias? | |
| group_norm | x, weight, bias, shift?, residual?, second? | groups, eps, activation |
| layer_norm | x `N L C`, weight, bias, shift?, residual? | eps |
| linear | x `.. Cin` or a volume, weight `[Cin, Cout]`, bias?, residual? | |
| attention | q, k, v `N L H*D` | heads, scale |
| pointwise | full or per-channel tensors | program (JSON), results |
| concat | any | axis |
| cast | x, a value of the wanted type | |
| columns | volume, tokens or vectors | start, stop: channels |
| tokens / volume | volume / tokens, a volume of the wanted sizes | |
| reshape | x, further values that sizes refer to | sizes: number, 0 to keep, -1, or [input, axis] |
| transpose, expand, matmul, einsum, softmax, resize, average_pool, pad | as PyTorch | |

group_norm and layer_norm have a second output, the sum x + shift + residual, where something reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from volcast import kernels
from volcast.kernels.layer_norm import add_layer_norm, layer_norm
from volcast.kernels.pointwise import pointwise

from .program import Operation

Values = Sequence[Tensor | None]


def evaluate(operation: Operation, inputs: Values) -> list[Tensor]:
    """The outputs of one operation, in its own dtype; a view where its kind is one, else new memory.

    Raises ValueError where the inputs do not fit, RuntimeError where PyTorch refuses them.
    """
    results = _EVALUATE[operation.kind](list(inputs), operation.settings)
    return results[: len(operation.outputs)]


def dense(x: Tensor) -> Tensor:
    """x in the layout that values of a program have: volumes channels last, all else contiguous."""
    if x.ndim >= 4:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def _convolution(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    x, weight, bias = (*i, None)[:3]
    function: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    bias = None if bias is None else bias.to(x.dtype)
    return [function(x, weight, bias, s["stride"], s["padding"], s["dilation"], s["groups"])]


def _transposed_convolution(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    x, weight, bias = (*i, None)[:3]
    function: Any = {4: F.conv_transpose2d, 5: F.conv_transpose3d}[x.ndim]
    bias = None if bias is None else bias.to(x.dtype)
    return [function(x, weight, bias, s["stride"], s["padding"], s["output_padding"], s["groups"], s["dilation"])]  # fmt: skip


def _input_head(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    return [kernels.input_head(*i, impl="eager")]


def _output_head(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    x, scale, offset, weight, bias = i
    return [
        kernels.output_head(
            x,
            s["groups"],
            scale,
            offset,
            weight,
            bias,
            eps=s["eps"],
            activation=s["activation"],
            impl="eager",
        )
    ]


def _upsample_convolution(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    x, weights, bias = (*i, None)[:3]
    return [kernels.upsample_convolution(x, weights, bias, impl="eager")]


def _group_norm(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    x, weight, bias, shift, residual, second = (*i, None, None, None)[:6]
    if shift is not None:  # columns of a table, or one for all samples
        shift = shift.reshape(-1, x.shape[1]).expand(x.shape[0], -1).contiguous()
    settings = {
        "eps": s["eps"],
        "activation": s["activation"],
        "shift": shift,
        "second": second,
        "impl": "eager",
    }
    if residual is not None:
        return list(kernels.add_group_norm(x, residual, s["groups"], weight, bias, **settings))
    y = kernels.group_norm(x, s["groups"], weight, bias, **settings)
    return [y]


def _layer_norm(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    x, weight, bias, shift, residual = (*i, None, None)[:5]
    if shift is None and residual is None:
        return [layer_norm(x, weight, bias, eps=s["eps"], impl="eager"), x]
    return list(add_layer_norm(x, weight, bias, eps=s["eps"], shift=shift, residual=residual, impl="eager"))


def _linear(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    x, weight, bias, residual = (*i, None, None)[:4]
    volume = x.ndim >= 4
    rows = x.movedim(1, -1) if volume else x
    # One product of matrices whatever the rank: PyTorch would choose between two by the strides.
    y = (rows.reshape(-1, rows.shape[-1]) @ weight).reshape(*rows.shape[:-1], -1)
    y = y if bias is None else y + bias.to(y.dtype)
    y = y.movedim(-1, 1) if volume else y
    return [y if residual is None else y + residual]


def _attention(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    q, k, v = (x.unflatten(-1, (s["heads"], -1)).transpose(1, 2) for x in i)
    return [kernels.attention(q, k, v, scale=s["scale"], impl="eager").transpose(1, 2).flatten(2)]


def _pointwise(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    return pointwise(i, s["program"], s["results"], impl="eager")


def _columns(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    (x,) = i
    return [x.narrow(1 if x.ndim >= 4 else -1, s["start"], s["stop"] - s["start"])]


def _tokens(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    return [i[0].flatten(2).transpose(1, 2)]


def _volume(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    x, like = i
    return [x.transpose(1, 2).unflatten(2, like.shape[2:])]


def _reshape(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    x = i[0]
    sizes = [
        i[size[0]].shape[size[1]] if isinstance(size, list | tuple) else x.shape[axis] if size == 0 else size
        for axis, size in enumerate(s["sizes"])
    ]
    return [x.reshape(sizes)]


def _resize(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    mode = "nearest" if s["mode"] == "nearest" else {5: "trilinear", 4: "bilinear", 3: "linear"}[i[0].ndim]
    size = i[1].shape[2:] if len(i) > 1 else None
    corners = None if mode == "nearest" else s["align_corners"]
    return [F.interpolate(i[0], size, None if size else s["scale"], mode, corners)]


def _average_pool(i: list[Any], s: dict[str, Any]) -> list[Tensor]:
    function: Any = {4: F.avg_pool2d, 5: F.avg_pool3d}[i[0].ndim]
    return [function(i[0], s["kernel"], s["stride"], s["padding"], s["ceil_mode"], s["count_include_pad"])]


_EVALUATE: dict[str, Callable[[list[Any], dict[str, Any]], list[Tensor]]] = {
    "attention": _attention,
    "average_pool": _average_pool,
    "cast": lambda i, s: [i[0].to(i[1].dtype, copy=True)],
    "columns": _columns,
    "concat": lambda i, s: [torch.cat(i, s["axis"])],
    "convolution": _convolution,
    "einsum": lambda i, s: [torch.einsum(s["equation"], *i)],
    "expand": lambda i, s: [i[0].expand(torch.broadcast_shapes(i[0].shape, s["sizes"]))],  # type: ignore[no-untyped-call]
    "group_norm": _group_norm,
    "input_head": _input_head,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": lambda i, s: [torch.matmul(*i)],
    "output_head": _output_head,
    "pad": lambda i, s: [F.pad(i[0], s["widths"], value=s["value"])],
    "pointwise": _pointwise,
    "reshape": _reshape,
    "resize": _resize,
    "softmax": lambda i, s: [torch.softmax(i[0].float(), s["axis"]).to(i[0].dtype)],
    "tokens": _tokens,
    "transpose": lambda i, s: [i[0].permute(s["order"])],
    "transposed_convolution": _transposed_convolution,
    "upsample_convolution": _upsample_convolution,
    "volume": _volume,
}
