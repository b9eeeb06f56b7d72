"""A small conditional diffusion model of 2D images with a classifier, both with random weights: MONAI's and exported."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelEncoder, DiffusionModelUNet
from torch import nn

from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle
from volcast.export.gradient import add_classifier
from volcast.runtime.spec import ConditionSpec, NoiseSchedule, SchedulerSpec

SHAPE = (1, 8, 12)
CLASSES = 3
SCHEDULER = SchedulerSpec(
    noise_schedule=NoiseSchedule(schedule="scaled_linear_beta", num_train_timesteps=40, beta_start=0.0015, beta_end=0.2),
    steps=8, clip_sample=True,
)  # fmt: skip
CONTEXT = ConditionSpec(name="context", shape=(1, 3), unconditional=-1.0)


def randomised(network: nn.Module, seed: int, deviation: float) -> nn.Module:
    """Every parameter N(0, deviation^2), scales of norms around 1: MONAI's fresh UNets give 0."""
    generator = torch.Generator().manual_seed(seed)
    for value in network.parameters():
        noise = deviation * torch.randn(value.shape, generator=generator)
        value.data = noise + (1 if value.dim() == 1 and bool((value == 1).all()) else 0)
    return network.eval().requires_grad_(False)


def unet() -> nn.Module:
    network = DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16), num_res_blocks=1, num_head_channels=8,
        attention_levels=(False, True), norm_num_groups=4, with_conditioning=True, cross_attention_dim=3,
    )  # fmt: skip
    return randomised(network, 0, 0.15)


def classifier(dims: int = 2, shape: tuple[int, ...] = SHAPE, resblock_updown: bool = False) -> nn.Module:
    network = DiffusionModelEncoder(
        spatial_dims=dims, in_channels=shape[0], out_channels=CLASSES, input_shape=shape[1:], num_res_blocks=1,
        channels=(8, 16), attention_levels=(False, True), norm_num_groups=4, num_head_channels=8,
        resblock_updown=resblock_updown,
    )  # fmt: skip
    return randomised(network, 1, 0.2)


def make(folder: Path) -> None:
    """The artifact, at `folder`, and with its classifier at `folder / classified`."""
    folder.mkdir()
    bundle = Bundle(
        name="small", unet=unet(), autoencoder=None, scheduler=SCHEDULER, scale_factor=1.0, latent_shape=SHAPE,
        spacing_mm=(1.0, 2.0), conditions=(CONTEXT,), provenance={},
    )  # fmt: skip
    export_bundle(bundle, folder / "plain")
    add_classifier(folder / "plain", classifier(), folder / "classified")
