"""Tiny bundles of a VQVAE with its transformer, every weight random, and MONAI's own networks for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import VQVAE, DecoderOnlyTransformer
from monai.utils.ordering import Ordering
from safetensors.torch import save_file

CODES = 8


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """What a tiny bundle says: `ordering` holds MONAI's arguments."""

    token_shape: tuple[int, ...]
    transformer: dict[str, Any]
    ordering: dict[str, Any]
    context_tokens: int = 0

    @property
    def dims(self) -> int:
        return len(self.token_shape)

    def vqvae_arguments(self) -> dict[str, Any]:
        return {
            "spatial_dims": self.dims, "in_channels": 1, "out_channels": 1, "channels": [4], "num_res_layers": 1,
            "num_res_channels": [4], "downsample_parameters": [[2, 4, 1, 1]], "num_embeddings": CODES,
            "upsample_parameters": [[2, 4, 1, 1, 0]], "embedding_dim": 3,
        }  # fmt: skip

    def transformer_arguments(self) -> dict[str, Any]:
        given = {"attn_layers_dim": 8, "attn_layers_depth": 2, "attn_layers_heads": 2}
        return {"num_tokens": CODES + 1, "max_seq_len": 16, **given, **self.transformer}

    def networks(self) -> tuple[Any, Any]:
        """MONAI's VQVAE and transformer; the begin token is never likely, or its sampler stops where top_k=1."""
        vqvae, transformer = (
            VQVAE(**self.vqvae_arguments()),
            DecoderOnlyTransformer(**self.transformer_arguments()),
        )
        generator = torch.Generator().manual_seed(self.dims)
        for name, value in [*vqvae.named_parameters(), *transformer.named_parameters()]:
            scale = 1.0 if "embedding" in name or "to_logits" in name else 0.3
            noise = scale * torch.randn(value.shape, generator=generator)
            value.data = noise + 1 if "norm" in name and name.endswith("weight") else noise
        vqvae.quantizer.quantizer.ema_w.data = vqvae.quantizer.quantizer.embedding.weight.data.clone()
        transformer.to_logits.bias.data[CODES] = -100.0
        return vqvae.eval(), transformer.eval()

    def order(self) -> Ordering:
        return Ordering(spatial_dims=self.dims, dimensions=(1, *self.token_shape), **self.ordering)

    def write(self, folder: Path, **changed: Any) -> Path:
        """The bundle in `folder`; `changed` replaces keys of its config."""
        vqvae, transformer = self.networks()
        both = {f"vqvae.{key}": value for key, value in vqvae.state_dict().items()}
        both |= {f"transformer.{key}": value for key, value in transformer.state_dict().items()}
        config = {
            "token_shape": list(self.token_shape),
            "ordering": {"_target_": "monai.utils.ordering.Ordering", **self.ordering},
            "vqvae_def": {"_target_": "VQVAE", **self.vqvae_arguments()},
            "transformer_def": {"_target_": "DecoderOnlyTransformer", **self.transformer_arguments()},
            "weights": "models/both.safetensors",
            **({"context_tokens": self.context_tokens} if self.context_tokens else {}),
            **changed,
        }
        for name in ("configs", "models"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(
            {key: value.contiguous() for key, value in both.items()}, folder / "models" / "both.safetensors"
        )
        (folder / "configs" / "inference.json").write_text(json.dumps(config))
        return folder


FLAT = Tiny(token_shape=(4, 3), transformer={"include_fc": False}, ordering={"ordering_type": "raster_scan"})
DEEP = Tiny(
    token_shape=(2, 3, 2),
    transformer={"with_cross_attention": True, "use_combined_linear": True},
    ordering={
        "ordering_type": "s_curve",
        "reflected_spatial_dims": [True, False, True],
        "transpositions_axes": [[1, 0, 2]],
        "rot90_axes": [[0, 2]],
    },
    context_tokens=3,
)
