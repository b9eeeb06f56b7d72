"""Small bundles in the manner of MONAI's 2d_super_resolution tutorial, with random weights in every parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mask_bundles import AUTOENCODER, UNET, write_bundle

from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle

TUTORIAL_BETAS = {"schedule": "linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
LOW_RES_SCHEDULER = {"_target_": "DDPMScheduler", "num_train_timesteps": 1000, **TUTORIAL_BETAS}
LEVELS = 400
"""Entries of the class embedding: more than the 351 levels of training."""


def upscaler(root: Path, dims: int, told: bool, **keys: Any) -> Bundle:
    """One of `dims` axes that doubles each; `told`: its UNet has a class embedding for the noise level.

    As in the tutorial the latent has the low-resolution image's size, and the image is the last channel of three.
    """
    unet = UNET | {"spatial_dims": dims, "in_channels": 3} | ({"num_class_embeds": LEVELS} if told else {})
    networks = {"network_def": unet, "autoencoder_def": AUTOENCODER | {"spatial_dims": dims}}
    shape = [2, 8, 12, 8][: dims + 1]
    given = {
        "low_res_scheduler": LOW_RES_SCHEDULER,
        "max_noise_level": 350,
        "spacing_mm": [0.5, 0.75, 1.0][:dims],
    }
    return write_bundle(root, networks, shape, **(given | keys))


def export_upscaler(folder: Path, dims: int, told: bool) -> None:
    """An upscaler under `artifact`, of the bundle under `bundle`."""
    export_bundle(upscaler(folder / "bundle", dims, told), folder / "artifact", batch=(1, 2))
