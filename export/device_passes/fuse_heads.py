"""fuse_heads: the convolutions for which there are kernels.

    norm, SiLU or none, 3^n convolution to a few channels   -> output_head
    3^n convolution from a few channels                      -> input_head
    transposed convolution of 4^n taps, stride 2, padding 1  -> upsample_convolution

The first two are what they replace, as the kernels' contracts define them. Along one axis the third is

    y[2i]     = w[3] x[i - 1] + w[1] x[i]          phase 0
    y[2i + 1] = w[2] x[i] + w[0] x[i + 1]          phase 1

(y[o] sums w[o + 1 - 2i] x[i]), so its packed weights are the taps in another order: exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from volcast.export.draft import Draft
from volcast.kernels.input_head import MAX_CHANNELS
from volcast.kernels.output_head import MAX_COLUMNS
from volcast.runtime.device.program import Operation

from .patterns import silu_of

TAPS = (3, 1, 2, 0)
"""The taps of phase 0, then those of phase 1, in the order in which they move over x."""
ALIGNED = 8
"""The fused upsample_convolution reads channels 16 bytes at a time: 8 of 16 bits."""


def packed_taps(weight: Tensor) -> Tensor:
    """[2^n phases, 2^n taps, Cin, Cout] of a transposed convolution's weight [Cin, Cout, 4, ..]."""
    cin, cout, *kernel = weight.shape
    axes = len(kernel)
    packed = weight
    for axis in range(2, 2 + axes):
        packed = packed.index_select(axis, torch.tensor(TAPS))
    packed = packed.reshape(cin, cout, *(2,) * 2 * axes)  # (phase, tap) of each axis
    order = (*range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2), 0, 1)
    return packed.permute(order).reshape(2**axes, 2**axes, cin, cout).contiguous()


def fuse_heads(draft: Draft) -> Draft:
    """Each convolution that a kernel's contract admits becomes that kernel's operation."""
    for one in draft.operations:
        if one.kind == "convolution" and _is_plain(one, draft):
            head = _output_head(draft, one) or _input_head(draft, one)
        elif one.kind == "transposed_convolution" and _doubles(one, draft):
            head = _upsample(draft, one)
        else:
            continue
        if head is not None:
            made, weights = head
            operations = [made if other == one else other for other in draft.operations]
            draft = draft.edited(operations, weights)
    return draft


def _weight(draft: Draft, one: Operation) -> Tensor | None:
    return draft.weights.get(one.inputs[1] or "")


def _is_plain(one: Operation, draft: Draft) -> bool:
    """3^n taps, stride 1, padding 1, no dilation, one group, of a volume or an image."""
    weight, s = _weight(draft, one), one.settings
    return (
        weight is not None
        and weight.ndim in (4, 5)
        and set(weight.shape[2:]) == {3}
        and all(set(s[name]) == {1} for name in ("stride", "padding", "dilation"))
        and s["groups"] == 1
    )


def _doubles(one: Operation, draft: Draft) -> bool:
    weight, s = _weight(draft, one), one.settings
    wanted = {"stride": 2, "padding": 1, "dilation": 1, "output_padding": 0}
    return (
        weight is not None
        and weight.ndim in (4, 5)
        and set(weight.shape[2:]) == {4}
        and all(set(s[name]) == {value} for name, value in wanted.items())
        and s["groups"] == 1
        and all(channels % ALIGNED == 0 for channels in weight.shape[:2])
    )


def _bias(one: Operation, weight: Tensor) -> tuple[str, dict[str, Tensor]]:
    """The convolution's bias, zeros where it has none: the heads need one."""
    if len(one.inputs) > 2 and one.inputs[2] is not None:
        return one.inputs[2], {}
    name = f"{one.outputs[0]}.bias"
    return name, {name: torch.zeros(weight.shape[0])}


def _output_head(draft: Draft, one: Operation) -> tuple[Operation, dict[str, Tensor]] | None:
    weight, x = _weight(draft, one), one.inputs[0]
    assert weight is not None and x is not None
    if weight.shape[0] > MAX_COLUMNS // 3 ** (weight.ndim - 2) or draft.only_consumer(x) != one:
        return None
    norm = draft.producer.get(x)
    if norm is None:
        return None
    activated = (
        norm.kind == "pointwise" and norm.inputs[0] is not None and silu_of(draft, norm.inputs[0]) == x
    )
    if activated:
        norm = draft.producer.get(norm.inputs[0] or "")
    if norm is None or norm.kind != "group_norm" or len(norm.inputs) != 3:
        return None
    settings = norm.settings
    if activated:
        if settings["activation"] != "none":
            return None
        settings = settings | {"activation": "silu"}
    bias, weights = _bias(one, weight)
    inputs = (*norm.inputs, one.inputs[1], bias)
    return Operation(kind="output_head", inputs=inputs, outputs=one.outputs, settings=settings), weights


def _input_head(draft: Draft, one: Operation) -> tuple[Operation, dict[str, Tensor]] | None:
    weight = _weight(draft, one)
    assert weight is not None
    if weight.shape[1] > MAX_CHANNELS[weight.ndim]:
        return None
    bias, weights = _bias(one, weight)
    return Operation(kind="input_head", inputs=(*one.inputs[:2], bias), outputs=one.outputs), weights


def _upsample(draft: Draft, one: Operation) -> tuple[Operation, dict[str, Tensor]]:
    weight = _weight(draft, one)
    assert weight is not None
    name = f"{one.outputs[0]}.phases"
    inputs = (one.inputs[0], name, *one.inputs[2:])
    return Operation(kind="upsample_convolution", inputs=inputs, outputs=one.outputs), {
        name: packed_taps(weight)
    }
