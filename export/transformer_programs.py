"""A token model's networks as captured programs with their contracts, before they become ONNX."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from volcast.runtime.spec import Axis

from .programs import CapturedModel, CapturedProgram, capture_program
from .transformer_bundle import TransformerBundle
from .transformer_networks import CodeDecoder, CodeEncoder, CrossAttention, TransformerStep


def capture_transformer(bundle: TransformerBundle, batch: tuple[int, int]) -> CapturedModel:
    """`step`, `prepare` (with cross-attention), `decode` and `encode`, with a free batch.

    The axis `block` is how many tokens a step takes: 1 when sampling, more when the whole sequence is known.
    """
    length = math.prod(bundle.token_shape)
    axes = [
        Axis(name="batch", minimum=batch[0], maximum=batch[1]),
        Axis(name="block", minimum=1, maximum=length),
    ]
    programs: dict[str, CapturedProgram] = {}
    cross: dict[str, Tensor] = {}
    if bundle.conditions:
        (condition,) = bundle.conditions
        context = torch.zeros(2, *(int(size) for size in condition.shape))
        network = CrossAttention(bundle.transformer)
        names = _layered("cross_keys", "cross_values", _layers(bundle.transformer))
        programs["prepare"] = capture_program(network, {"context": context}, {"context": {0: "batch"}}, names)
        cross = dict(zip(names, network(context), strict=True))
    programs["step"] = _step(bundle.transformer, length, cross)
    indices = torch.zeros(2, *bundle.token_shape, dtype=torch.int64)
    programs["decode"] = capture_program(
        CodeDecoder(bundle.vqvae), {"indices": indices}, {"indices": {0: "batch"}}, ["image"]
    )
    channels = bundle.vqvae.in_channels
    assert isinstance(channels, int)
    image = torch.zeros(2, channels, *bundle.image_shape[1:])
    programs["encode"] = capture_program(
        CodeEncoder(bundle.vqvae), {"image": image}, {"image": {0: "batch"}}, ["indices"]
    )
    return CapturedModel(programs=programs, axes=tuple(axes))


def _layers(transformer: nn.Module) -> int:
    return len(transformer.blocks)  # type: ignore[arg-type]


def _layered(keys: str, values: str, layers: int) -> list[str]:
    return [f"{name}_{layer}" for layer in range(layers) for name in (keys, values)]


def _step(transformer: nn.Module, length: int, cross: Mapping[str, Tensor]) -> CapturedProgram:
    attention = transformer.blocks[0].attn  # type: ignore[index, union-attr]
    heads, width = int(attention.num_heads), int(attention.dim_head)
    caches = _layered("keys", "values", _layers(transformer))
    # A block of its own size: torch takes equal sizes for one, and 1 for fixed.
    examples = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "positions": torch.arange(3), **cross}
    for name in caches:
        shape = (width, length) if name.startswith("keys") else (length, width)
        examples[name] = torch.zeros(2, heads, *shape)
    free: dict[str, dict[int, str]] = {name: {0: "batch"} for name in examples}
    free |= {"tokens": {0: "batch", 1: "block"}, "positions": {0: "block"}}
    return capture_program(TransformerStep(transformer, length), examples, free, ["logits", "keys", "values"])
