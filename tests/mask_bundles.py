"""Small bundles of SPADE networks and ControlNets, with random weights in every parameter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from volcast.export.bundle import Bundle, read_bundle
from volcast.export.bundle_plan import plan_bundle

UNET: dict[str, Any] = {
    "_target_": "DiffusionModelUNet", "spatial_dims": 3, "in_channels": 2, "out_channels": 2, "num_res_blocks": 1,
    "channels": [8, 16], "attention_levels": [False, True], "norm_num_groups": 8, "num_head_channels": [0, 8],
}  # fmt: skip
CROSS = {"with_conditioning": True, "cross_attention_dim": 5}
AUTOENCODER: dict[str, Any] = {
    "_target_": "AutoencoderKL", "spatial_dims": 3, "latent_channels": 2, "channels": [8, 16], "num_res_blocks": 1,
    "attention_levels": [False, False], "norm_num_groups": 8, "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}  # fmt: skip
SCHEDULER = {
    "_target_": "monai.networks.schedulers.ddim.DDIMScheduler", "schedule": "scaled_linear_beta",
    "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False,
}  # fmt: skip
LABELS = ["background", "liver", "tumour"]


def controlnet(
    unet: dict[str, Any], hint_channels: int, embedding: list[int], **changes: Any
) -> dict[str, Any]:
    shared = {key: value for key, value in unet.items() if key != "out_channels"}
    shared |= {"_target_": "ControlNet", "conditioning_embedding_in_channels": hint_channels}
    return shared | {"conditioning_embedding_num_channels": embedding} | changes


def spade(network: dict[str, Any], **changes: Any) -> dict[str, Any]:
    target = {"DiffusionModelUNet": "SPADEDiffusionModelUNet", "AutoencoderKL": "SPADEAutoencoderKL"}
    return network | {
        "_target_": target[network["_target_"]], "label_nc": len(LABELS), "spade_intermediate_channels": 8,
    } | changes  # fmt: skip


def write_bundle(root: Path, networks: dict[str, Any], latent_shape: list[int], **keys: Any) -> Bundle:
    """A bundle of these components (`network_def`, `autoencoder_def`, others ControlNets), read back.

    Weights are N(0, 1 / fan-in) and norm scales 1 + N(0, 0.05^2): every part of the network matters.
    """
    config: dict[str, Any] = copy.deepcopy(networks) | {
        "noise_scheduler": SCHEDULER,
        "num_inference_steps": 3,
    }
    config |= {"latent_shape": latent_shape, "scale_factor": 0.8, **keys}
    for id in networks:
        config[f"load_{id}"] = f"$@{id}.load_state_dict(load_file(@bundle_root + '/{id}.safetensors'))"
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "inference.json").write_text(json.dumps(config))
    controls = [id for id in networks if id not in ("network_def", "autoencoder_def")]
    plan = plan_bundle(root, controlnets=controls)
    generator = torch.Generator().manual_seed(0)
    for network in (plan.unet, plan.autoencoder, *plan.controls):
        if network is None:
            continue
        state = {}
        for key, value in network.build().state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            scale = 0.05 if value.ndim < 2 else value[0].numel() ** -0.5
            state[key] = noise * scale + (
                1.0 if "norm" in key and key.endswith("weight") and value.ndim < 2 else 0.0
            )
        save_file(state, root / f"{network.id}.safetensors")
    return read_bundle(root, controlnets=controls)
