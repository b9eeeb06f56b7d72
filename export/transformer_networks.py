"""A VQVAE and its transformer in the form that volcast captures: plain functions of tensors, one per program.

MONAI's transformer has no cache and runs again over the whole sequence for each token (quadratic work, cubic with
attention). Here the keys and values of earlier tokens are inputs, so that a token is computed once.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

HIDDEN = -1e30
"""Added to a score that must not count; its exponential is 0, and unlike -inf it makes no NaN on any engine."""


@final
class TransformerStep(nn.Module):
    """`forward(tokens, positions, *cross, *cache) -> (logits, keys, values)` around MONAI's DecoderOnlyTransformer.

    tokens int64 [N, B], a block of the sequence (one token when sampling); positions int64 [B], ascending by one;
    cross: for each layer with cross-attention keys [N, H, d, K] and values [N, H, K, d] (`CrossAttention`); cache: for
    each layer keys [N, H, d, L] and values [N, H, L, d] of which those before positions[0] count. logits [N, B, T];
    keys [layers, N, H, d, B] and values [layers, N, H, B, d] are the block's own, to be put into the cache.
    """

    def __init__(self, transformer: nn.Module, length: int) -> None:
        super().__init__()
        self.transformer: Any = transformer
        self.register_buffer("places", torch.arange(length, dtype=torch.float32))

    def forward(self, tokens: Tensor, positions: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        network = self.transformer
        layers = len(network.blocks)
        cross = given[: 2 * layers] if network.with_cross_attention else ()
        cache = given[len(cross) :]
        at = positions.float()
        past_mask = (self.places - at[:1] + 1).clamp(0, 1) * HIDDEN  # type: ignore[operator]
        own_mask = (at.unsqueeze(0) - at.unsqueeze(1)).clamp(0, 1) * HIDDEN
        x = network.token_embeddings(tokens) + network.position_embeddings.embedding(positions)
        all_keys, all_values = [], []
        for index, block in enumerate(network.blocks):
            past_keys, past_values = cache[2 * index], cache[2 * index + 1]
            attention = block.attn
            q, k, v = (_heads(part, attention.num_heads) for part in _projected(attention, block.norm1(x)))
            k = k.transpose(-1, -2)
            q = q * attention.scale
            scores = torch.cat((torch.matmul(q, past_keys) + past_mask, torch.matmul(q, k) + own_mask), -1)
            weights = scores.softmax(-1)
            length = past_keys.shape[-1]
            mixed = torch.matmul(weights[..., :length], past_values) + torch.matmul(weights[..., length:], v)
            found = _joined(mixed)
            x = x + (attention.out_proj(found) if attention.include_fc else found)
            if cross:
                x = x + _cross(block, x, cross[2 * index], cross[2 * index + 1])
            x = x + block.mlp(block.norm2(x))
            all_keys.append(k.unsqueeze(0))
            all_values.append(v.unsqueeze(0))
        return network.to_logits(x), torch.cat(all_keys), torch.cat(all_values)


@final
class CrossAttention(nn.Module):
    """`forward(context) -> (keys, values) of each layer`: what the step needs of the context [N, K, C], once a request."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer: Any = transformer

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for block in self.transformer.blocks:
            attention = block.cross_attn
            found.append(_heads(attention.to_k(context), attention.num_heads).transpose(-1, -2))
            found.append(_heads(attention.to_v(context), attention.num_heads))
        return tuple(found)


@final
class CodeDecoder(nn.Module):
    """`forward(indices) -> image`: MONAI's `decode_samples`; indices int64 [N, *token_shape], looked up as a gather."""

    def __init__(self, vqvae: nn.Module) -> None:
        super().__init__()
        self.vqvae: Any = vqvae

    def forward(self, indices: Tensor) -> Any:
        codes = nn.functional.embedding(indices, self.vqvae.quantizer.quantizer.embedding.weight)
        return self.vqvae.decoder(codes.permute(0, -1, *range(1, indices.ndim)))


@final
class CodeEncoder(nn.Module):
    """`forward(image) -> indices`: MONAI's `index_quantize` without its one-hot; the nearest code of each position.

    |z|^2, the same for every code, is left out of the distances: that changes none of them but for rounding.
    """

    def __init__(self, vqvae: Any) -> None:
        super().__init__()
        self.vqvae = vqvae
        codes: Tensor = vqvae.quantizer.quantizer.embedding.weight.detach()
        self.register_buffer("directions", -2 * codes)
        self.register_buffer("lengths", codes.square().sum(1))

    def forward(self, image: Tensor) -> Tensor:
        z = self.vqvae.encoder(image)
        last = z.permute(0, *range(2, z.ndim), 1)
        return nn.functional.linear(last, self.directions, self.lengths).argmin(-1)  # type: ignore[arg-type]


def _projected(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    if attention.use_combined_linear:
        return tuple(attention.qkv(x).chunk(3, -1))
    return attention.to_q(x), attention.to_k(x), attention.to_v(x)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[N, B, H d] -> [N, H, B, d]"""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).permute(0, 2, 1, 3)


def _joined(x: Tensor) -> Tensor:
    """[N, H, B, d] -> [N, B, H d]"""
    return x.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def _cross(block: Any, x: Tensor, keys: Tensor, values: Tensor) -> Any:
    attention = block.cross_attn
    q = _heads(attention.to_q(block.norm_cross_attn(x)), attention.num_heads) * attention.scale
    return attention.out_proj(_joined(torch.matmul(torch.matmul(q, keys).softmax(-1), values)))
