"""phase_conv: nearest-neighbour x2 upsampling followed by a 3^n convolution, as one transposed convolution.

Along one axis, with taps (a, b, c) and nearest x2 upsampling u[2i] = u[2i+1] = x[i], zero-padded:
    y[2i]   = a x[i-1] + (b + c) x[i]          y[2i+1] = (a + b) x[i] + c x[i+1]
which is a transposed convolution of stride 2, padding 1 and the four taps (c, b + c, a + b, a). In 3D that is
8 multiply-adds an output voxel instead of 27, and the upsampled tensor is never written. Exact algebra: the taps
are added in float64 and rounded once. MAISI upsamples trilinearly, so its decoder does not match.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from volcast.export.graph import (
    add_parameter,
    argument,
    aten,
    clone,
    finish,
    is_parameter,
    parameter,
    shape_of,
)

NEAREST: dict[Any, int] = {aten.upsample_nearest2d.vec: 2, aten.upsample_nearest3d.vec: 3}
"""Upsampling operators and their number of spatial axes."""

TRANSPOSED: dict[Any, Any] = {
    aten.conv2d.default: aten.conv_transpose2d.input,
    aten.conv3d.default: aten.conv_transpose3d.input,
}

TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
"""Row k: which of the taps (a, b, c) add up to tap k of the transposed convolution."""


def phase_weight(weight: Tensor) -> Tensor:
    """Transposed-convolution weight [I, O, 4, 4(, 4)] of a convolution weight [O, I, 3, 3(, 3)]."""
    taps = torch.tensor(TAPS, dtype=torch.float64)
    result = weight.double().transpose(0, 1)
    for axis in range(2, weight.ndim):
        result = torch.tensordot(result, taps, dims=([axis], [1])).movedim(-1, axis)
    return result.to(weight.dtype).contiguous()


def _doubles(node: Node) -> bool:
    dims = NEAREST.get(node.target)
    scale = argument(node, 2, node.kwargs.get("scale_factors"))
    return (
        dims is not None and argument(node, 1) is None and scale is not None and list(scale) == [2.0] * dims
    )


def _is_same_convolution(node: Node) -> bool:
    """3^n taps, stride 1, padding 1, no dilation, one group."""
    if node.target not in TRANSPOSED or not is_parameter(argument(node, 1)):
        return False
    stride, padding, dilation = argument(node, 3, [1]), argument(node, 4, [0]), argument(node, 5, [1])
    taps = shape_of(argument(node, 1))[2:]
    return (
        all(size == 3 for size in taps)
        and (set(stride), set(padding), set(dilation)) == ({1}, {1}, {1})
        and argument(node, 6, 1) == 1
    )


def phase_conv(graph_module: GraphModule) -> GraphModule:
    """Every nearest x2 whose only readers are 3^n convolutions becomes transposed convolutions."""
    result = clone(graph_module)
    for upsample in list(result.graph.nodes):
        if not _doubles(upsample) or not all(_is_same_convolution(user) for user in upsample.users):
            continue
        dims = NEAREST[upsample.target]
        for convolution in list(upsample.users):
            with result.graph.inserting_before(convolution):
                weight = phase_weight(parameter(result, argument(convolution, 1)))
                place = add_parameter(result, f"phase_{convolution.name}", weight)
                arguments = (argument(upsample, 0), place, argument(convolution, 2), [2] * dims, [1] * dims)
                replacement = result.graph.call_function(TRANSPOSED[convolution.target], arguments)
            replacement.meta["val"] = convolution.meta["val"]
            convolution.replace_all_uses_with(replacement)
    return finish(result)
