"""One-pass networks in the form that volcast captures: plain functions of tensors, one per program.

In SPADENet every norm's scale and shift depend on the label map alone: `SpadeConditions` computes them, once a request,
and `SpadeImage` takes them.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from .networks import encoded


@final
class NoiseImage(nn.Module):
    """`forward(z) -> image` around MONAI's Generator; `sigmoid`: the bundle's activation of what it makes."""

    def __init__(self, network: nn.Module, sigmoid: bool) -> None:
        super().__init__()
        self.network = network
        self.sigmoid = sigmoid

    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = self.network(z)
        return torch.sigmoid(image) if self.sigmoid else image


@final
class SpadeConditions(nn.Module):
    """`forward(mask) -> (scale, shift) of each norm in the order of use`, 1 + gamma and beta `[N, C, *size]`.

    mask int64 `[N, *image]`. A network without a VAE begins with the label map too: its first value is last here.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.decoder = network.decoder
        self.register_buffer("table", torch.eye(network.label_nc))

    def forward(self, mask: Tensor) -> tuple[Tensor, ...]:
        channels = encoded(mask, self.table)  # type: ignore[arg-type]
        sizes = list(self.decoder.latent_spatial_shape)
        found: list[Tensor] = []
        for block in self.decoder.blocks:
            shown = functional.interpolate(channels, size=sizes, mode="nearest")
            for norm in _norms(block):
                hidden = norm.mlp_shared(shown)
                found += [1 + norm.mlp_gamma(hidden), norm.mlp_beta(hidden)]
            sizes = [2 * size for size in sizes]
        if not self.decoder.is_vae:
            small = functional.interpolate(channels, size=tuple(self.decoder.latent_spatial_shape))
            found.append(self.decoder.conv_init(small))
        return tuple(found)


@final
class SpadeImage(nn.Module):
    """`forward(z, *constants) -> image`: MONAI's `SPADENet.decode` with what `SpadeConditions` made; z `[N, Z]`.

    A network without a VAE takes no z: `forward(*constants)`.
    """

    def __init__(self, network: Any, sigmoid: bool) -> None:
        super().__init__()
        self.decoder = network.decoder
        self.sigmoid = sigmoid

    def forward(self, *given: Tensor) -> Tensor:
        decoder: Any = self.decoder
        if decoder.is_vae:
            constants = iter(given[1:])
            x = decoder.fc(given[0]).reshape(-1, decoder.num_channels[0], *decoder.latent_spatial_shape)
        else:
            constants, x = iter(given[:-1]), given[-1]
        for block in decoder.blocks:
            read = [(norm.param_free_norm, next(constants), next(constants)) for norm in _norms(block)]
            hidden = block.conv_0(block.activation(_normed(x, *read[0])))
            hidden = block.conv_1(block.activation(_normed(hidden, *read[1])))
            shortcut = block.conv_s(_normed(x, *read[2])) if block.learned_shortcut else x
            x = decoder.upsampling(shortcut + hidden)
        image: Tensor = decoder.last_conv(x)
        return torch.sigmoid(image) if self.sigmoid else image


@final
class SpadeStyle(nn.Module):
    """`forward(image) -> (z_mu, z_sigma)`: mean and deviation of the noise that has the style of an image."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.encoder = network.encoder

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(image)
        return mean, torch.exp(0.5 * log_variance)


def _norms(block: Any) -> list[Any]:
    return [block.norm_0, block.norm_1, *([block.norm_s] if block.learned_shortcut else [])]


def _normed(x: Tensor, norm: nn.Module, scale: Tensor, shift: Tensor) -> Tensor:
    normed: Tensor = norm(x)
    return normed * scale + shift
