"""The networks of a bundle in the form that volcast captures: plain functions of tensors, one per program."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiConvolution, MaisiGroupNorm3D
from torch import Tensor, nn


class Denoiser(nn.Module):
    """`forward(x, timesteps, *conditions) -> out` around a MONAI diffusion UNet.

    x [N, C, *spatial]; timesteps float [N]; conditions in the order of `conditions`, by the names of the UNet's
    arguments, except `concat` [N, C', *spatial], which is concatenated to x (MONAI's `mode="concat"`).
    """

    def __init__(self, unet: nn.Module, conditions: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self.conditions = tuple(conditions)

    def forward(self, x: Tensor, timesteps: Tensor, *values: Tensor) -> Any:
        keywords = dict(zip(self.conditions, values, strict=True))
        if "concat" in keywords:
            x = torch.cat((x, keywords.pop("concat")), dim=1)
        return self.unet(x, timesteps, **keywords)


class Decoder(nn.Module):
    """`forward(z) -> image`: MONAI's `decode_stage_2_outputs`; z [N, C, *spatial] already divided by the scale."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, z: Tensor) -> Any:
        return self.autoencoder.decode(z)  # type: ignore[operator]


class Encoder(nn.Module):
    """`forward(image) -> (z_mu, z_sigma)`: mean and standard deviation of the latent, not multiplied by the scale."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: Tensor) -> Any:
        return self.autoencoder.encode(image)  # type: ignore[operator]


def plain_modules(network: nn.Module) -> nn.Module:
    """A copy with MAISI's memory-saving modules replaced by the mathematics they stand for.

    MaisiGroupNorm3D loops over groups and MaisiConvolution over slabs of the volume, both with side effects that
    capture cannot follow; they equal GroupNorm and the inner convolution (and are wrong where the slabs do not
    divide the size, MONAI 1.6.1).
    """
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MaisiGroupNorm3D):
                norm = nn.GroupNorm(child.num_groups, child.num_channels, eps=child.eps, affine=child.affine)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(parent, name, norm)
            elif isinstance(child, MaisiConvolution):
                setattr(parent, name, child.conv)
    return network.eval()
