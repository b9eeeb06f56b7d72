"""Which channels of a UNet's input are the latent: those first, unless the bundle was trained with the condition first."""

from __future__ import annotations

import torch

from volcast.export.bundle_config import Config, shown

CONCAT_FIRST = "concat_first"
"""The setting: MONAI's inferers concatenate a condition behind x, its image-to-image tutorial before x."""


def put_latent_first(config: Config, unet: torch.nn.Module, latent_channels: int) -> None:
    """With the setting, move the condition's input channels of the first convolution behind the latent's, in place.

    The network is the same but for the order of its input, in which all else here is written. ValueError: no truth value,
    or a network without a condition to concatenate.
    """
    first = config.need(CONCAT_FIRST) if CONCAT_FIRST in config else False
    if first not in (True, False):
        raise ValueError(f"[bundle] {CONCAT_FIRST}={shown(first)}: need true or false")
    if not first:
        return
    weight: torch.Tensor = unet.conv_in.conv.weight  # type: ignore[union-attr, assignment]
    extra = weight.shape[1] - latent_channels
    if extra < 1:
        raise ValueError(
            f"[bundle] {CONCAT_FIRST}: the UNet takes nothing beside the latent's {latent_channels} channels; leave it out"
        )
    with torch.no_grad():
        weight.copy_(torch.cat((weight[:, extra:], weight[:, :extra]), dim=1))
