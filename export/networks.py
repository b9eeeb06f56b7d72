"""The networks of a bundle in the form that volcast captures: plain functions of tensors, one per program."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiConvolution, MaisiGroupNorm3D
from monai.networks.nets.vqvae import VQVAE
from torch import Tensor, nn
from torch.nn import functional

from volcast.export.text_encoder import TEXT
from volcast.runtime.spec import LOW_RES, TAU

MASK, SCALE = "mask", "controlnet_scale"
"""Names of conditions: SPADE's label map, and what multiplies the ControlNets' residuals."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """A ControlNet, and the name of the condition that it is shown (its hint)."""

    network: nn.Module
    hint: str


class Denoiser(nn.Module):
    """`forward(x, timesteps, *conditions) -> out` around a MONAI diffusion UNet and its ControlNets.

    x [N, C, *spatial]; timesteps float [N]; conditions in the order of `conditions`, by the names of the UNet's
    arguments, except: `concat` or `low_res` [N, C', *spatial] is concatenated to x (MONAI's `mode="concat"`); `tau`,
    an upscaler's noise level, is `class_labels`; `text`, token ids, goes through `text_encoder` to be `context`; `mask` is
    SPADE's `seg`; hints go to the ControlNets, whose residuals are multiplied by `controlnet_scale` [N, controls] and
    added up.
    Hints and masks are [N, C, *image]; those in `encodings` are label maps [N, *image], int64: label l becomes the
    channels `encodings[name][l]`.
    """

    def __init__(
        self,
        unet: nn.Module,
        conditions: Sequence[str],
        controls: Sequence[Control] = (),
        encodings: Mapping[str, Tensor] = MappingProxyType({}),
        text_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.conditions = tuple(conditions)
        self.controls = nn.ModuleList(control.network for control in controls)
        self.hints = tuple(control.hint for control in controls)
        self.encoded = tuple(encodings)
        for name, table in encodings.items():
            self.register_buffer(f"{name}_encoding", table)

    def forward(self, x: Tensor, timesteps: Tensor, *values: Tensor) -> Any:
        given = dict(zip(self.conditions, values, strict=True))
        for name in self.encoded:
            given[name] = encoded(given[name], getattr(self, f"{name}_encoding"))
        hints = [given.pop(hint) for hint in self.hints]
        scales = given.pop(SCALE, None)
        if MASK in given:
            given["seg"] = given.pop(MASK)
        for beside in ("concat", LOW_RES):
            if beside in given:
                x = torch.cat((x, given.pop(beside)), dim=1)
        if self.text_encoder is not None:
            given["context"] = self.text_encoder(given.pop(TEXT))
        if TAU in given:
            given["class_labels"] = given.pop(TAU)
        residuals: list[Tensor] = []
        for index, (control, hint) in enumerate(zip(self.controls, hints, strict=True)):
            scale = 1.0 if scales is None else scales[:, index].reshape(-1, *[1] * (x.ndim - 1))
            down, middle = control(
                x, timesteps, resized_hint(control, hint, x), scale, **control_arguments(control, given)
            )
            found = [*down, middle]
            residuals = [a + b for a, b in zip(residuals, found, strict=True)] if residuals else found
        if residuals:
            given["down_block_additional_residuals"] = residuals[:-1]  # type: ignore[assignment]
            given["mid_block_additional_residual"] = residuals[-1]
        return self.unet(x, timesteps, **given)


def encoded(labels: Tensor, table: Tensor) -> Tensor:
    """A label map [N, *image] as channels [N, C, *image]: label l becomes `table[l]`."""
    return functional.embedding(labels, table).permute(0, -1, *range(1, labels.ndim))


def hint_scale(control: nn.Module) -> int:
    """How many times the latent's size a ControlNet's hint has along each axis: its embedding halves it so often."""
    blocks: nn.ModuleList = control.controlnet_cond_embedding.blocks  # type: ignore[union-attr, assignment]
    return int(2 ** (len(blocks) // 2))


def resized_hint(control: nn.Module, hint: Tensor, x: Tensor) -> Tensor:
    """The hint in the size that the ControlNet needs beside x; nearest, as MONAI's latent inferer does it."""
    wanted = [size * hint_scale(control) for size in x.shape[2:]]
    return (
        hint if list(hint.shape[2:]) == wanted else functional.interpolate(hint, size=wanted, mode="nearest")
    )


def control_arguments(control: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """What of the UNet's conditions the ControlNet takes too."""
    takes = {"context": control.with_conditioning, "class_labels": control.num_class_embeds is not None}
    return {name: given[name] for name, wanted in takes.items() if wanted and name in given}


class Decoder(nn.Module):
    """`forward(z, *mask) -> image`: MONAI's `decode_stage_2_outputs`; z [N, C, *spatial] already divided by the scale.

    With `encoding` [labels, C] the autoencoder is SPADE's, and the mask a label map [N, *image], int64.
    """

    def __init__(self, autoencoder: nn.Module, encoding: Tensor | None = None) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.register_buffer("encoding", encoding)

    def forward(self, z: Tensor, *mask: Tensor) -> Any:
        shown = [encoded(one, self.encoding) for one in mask]  # type: ignore[arg-type]
        return self.autoencoder.decode(quantized(self.autoencoder, z), *shown)  # type: ignore[operator]


class Encoder(nn.Module):
    """`forward(image) -> (z_mu, z_sigma)`: mean and standard deviation of the latent, not multiplied by the scale.

    A VQVAE's latent has no deviation: `(z_mu,)`, the codes nearest to what its encoder makes.
    """

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: Tensor) -> Any:
        made = self.autoencoder.encode(image)  # type: ignore[operator]
        return (quantized(self.autoencoder, made),) if isinstance(self.autoencoder, VQVAE) else made


def quantized(autoencoder: nn.Module, z: Tensor) -> Tensor:
    """The code of a VQVAE that is nearest to each vector of z `[N, C, *spatial]`; z itself for other autoencoders.

    MONAI's `quantize` without its one-hot. |z|^2, the same for every code, is left out of the distances: it changes
    none of them but for rounding.
    """
    if not isinstance(autoencoder, VQVAE):
        return z
    codes = autoencoder.quantizer.quantizer.embedding.weight
    last = z.permute(0, *range(2, z.ndim), 1)
    nearest = functional.linear(last, -2 * codes, codes.square().sum(1)).argmin(-1)
    return functional.embedding(nearest, codes).permute(0, -1, *range(1, nearest.ndim))


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
