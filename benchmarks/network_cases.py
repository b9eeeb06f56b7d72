"""The models that the CUDA engine is judged by: MONAI's published 3D networks at full size, weights drawn anew.

Constructor arguments are those of the model zoo's inference configs: brain_image_synthesis_latent_diffusion_model
(commit 17e7879), brats_mri_generative_diffusion (68fff52), maisi_ct_generative with rectified flow (1421e3e). The
trained weights are not needed to measure; those drawn here keep the size of what passes through them, so that fifty
steps stay finite. The bundled model has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import nn

from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle, read_bundle
from volcast.export.bundle_conditions import network_conditions
from volcast.export.bundle_networks import plan_network
from volcast.export.to_cuda import build_cuda
from volcast.runtime.artifact import MANIFEST
from volcast.runtime.default_artifact import BUNDLE
from volcast.runtime.spec import NoiseSchedule, SchedulerSpec

PartName = Literal["step", "decode", "volume"]


@final
@dataclass(frozen=True, kw_only=True)
class Part:
    """What is measured of a model.

    `part`: `step`, `decode`, or `volume` (50 DDIM steps and the decoding). `latent`: its spatial sizes.
    `batches`: how many samples at once; decoding takes them one by one. `reach_ms`, `reach_bytes`: the target on one
    H100 at batch 1. `alone`: so large that the ways to run it are timed one after the other instead of in turns.
    """

    part: PartName
    latent: tuple[int, int, int]
    batches: tuple[int, ...] = (1, 2, 4, 8)
    reach_ms: float | None = None
    reach_bytes: int | None = None
    alone: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and what is measured of it. `bundle(shipped)` makes it; `shipped` is for running MONAI itself on a GPU: with
    the published memory-saving options, which change no result and which an export leaves out."""

    name: str
    bundle: Callable[[bool], Bundle]
    parts: tuple[Part, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Published:
    """Constructor arguments by MONAI's names; `shipped`: those besides that only a GPU takes."""

    network: str
    arguments: Mapping[str, Any]
    shipped: Mapping[str, Any] = field(default_factory=dict)

    def build(self, seed: int, shipped: bool) -> nn.Module:
        plan = plan_network(self.network, self.network, self.arguments)
        return drawn(plan.build(**(self.shipped if shipped else {})), seed)


def drawn(network: nn.Module, seed: int) -> nn.Module:
    """A network built on `meta`, on the CPU, every parameter drawn: MONAI's fresh UNets return exactly 0.

    Products get variance 1 / fan-in, so a layer's output is as large as its input; norms scale by 0.9..1.1.
    """
    generator = torch.Generator().manual_seed(seed)
    network.to_empty(device="cpu")
    for name, value in network.named_parameters():
        with torch.no_grad():
            if value.ndim > 1:
                bound = math.sqrt(3 / value[0].numel())
                value.uniform_(-bound, bound, generator=generator)
            elif name.endswith("weight"):
                value.uniform_(0.9, 1.1, generator=generator)
            else:
                value.uniform_(-0.1, 0.1, generator=generator)
    if list(network.buffers()):
        raise ValueError(f"[bench] {type(network).__name__} has buffers: draw them too")
    return network.requires_grad_(False).eval()


def published(
    name: str, unet: Published, autoencoder: Published, latent: tuple[int, ...], scheduler: SchedulerSpec
) -> Callable[[bool], Bundle]:
    def bundle(shipped: bool) -> Bundle:
        arguments = plan_network(unet.network, unet.network, unet.arguments).arguments
        return Bundle(
            name=name, unet=unet.build(0, shipped), autoencoder=autoencoder.build(1, shipped),
            scheduler=scheduler, scale_factor=1.0, latent_shape=latent, spacing_mm=(1.0, 1.0, 1.0),
            conditions=network_conditions(arguments, latent[0]), provenance={"weights": "drawn for a benchmark"},
        )  # fmt: skip

    return bundle


def ddim(beta_end: float) -> SchedulerSpec:
    schedule = NoiseSchedule(schedule="scaled_linear_beta", beta_start=0.0015, beta_end=beta_end)
    return SchedulerSpec(scheduler="ddim", noise_schedule=schedule, steps=50)


def artifact(case: Case, work: Path) -> Path:
    """The case's artifact in `work`, with device programs in float16; an export that is there already is taken.

    Raises ValueError where the model cannot be exported or built.
    """
    folder = work / case.name
    if not (folder / MANIFEST).is_file():
        export_bundle(case.bundle(False), folder, batch=(1, 8))
    build_cuda(folder, precision="fp16", replace=True)
    return folder


BRAIN_LDM = published(
    "brain_ldm",
    Published(network="DiffusionModelUNet", arguments={
        "spatial_dims": 3, "in_channels": 7, "out_channels": 3, "channels": (256, 512, 768), "num_res_blocks": 2,
        "attention_levels": (False, True, True), "norm_num_groups": 32, "norm_eps": 1e-6, "resblock_updown": True,
        "num_head_channels": (0, 512, 768), "with_conditioning": True, "transformer_num_layers": 1,
        "cross_attention_dim": 4, "upcast_attention": True,
    }),
    Published(network="AutoencoderKL", arguments={
        "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 3, "channels": (64, 128, 128, 128),
        "num_res_blocks": 2, "norm_num_groups": 32, "norm_eps": 1e-6, "attention_levels": (False,) * 4,
        "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False,
    }),
    (3, 20, 28, 20), ddim(0.0205),
)  # fmt: skip

BRATS = published(
    "brats_3d",
    Published(network="DiffusionModelUNet", arguments={
        "spatial_dims": 3, "in_channels": 8, "out_channels": 8, "channels": (256, 256, 512), "num_res_blocks": 2,
        "attention_levels": (False, True, True), "num_head_channels": (0, 64, 64), "include_fc": False,
        "use_combined_linear": False,
    }),
    Published(network="AutoencoderKL", arguments={
        "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 8, "channels": (64, 128, 256),
        "num_res_blocks": 2, "norm_num_groups": 32, "norm_eps": 1e-6, "attention_levels": (False,) * 3,
        "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False, "include_fc": False,
    }),
    (8, 36, 44, 28), ddim(0.0195),
)  # fmt: skip

MAISI = published(
    "maisi",
    Published(network="DiffusionModelUNetMaisi", arguments={
        "spatial_dims": 3, "in_channels": 4, "out_channels": 4, "num_channels": (64, 128, 256, 512),
        "num_res_blocks": 2, "attention_levels": (False, False, True, True), "num_head_channels": (0, 0, 32, 32),
        "include_spacing_input": True, "num_class_embeds": 128, "resblock_updown": True, "include_fc": True,
    }, shipped={"use_flash_attention": True}),
    Published(network="AutoencoderKlMaisi", arguments={
        "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 4, "num_channels": (64, 128, 256),
        "num_res_blocks": (2, 2, 2), "norm_num_groups": 32, "norm_eps": 1e-6, "attention_levels": (False,) * 3,
        "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False,
    }, shipped={"num_splits": 2, "dim_split": 1, "save_mem": True}),
    (4, 64, 64, 64),
    SchedulerSpec(scheduler="rflow", prediction_type="flow", steps=30, use_discrete_timesteps=False,
                  use_timestep_transform=True),
)  # fmt: skip

CASES = (
    Case(name="BrainLDM", bundle=BRAIN_LDM, parts=(
        Part(part="step", latent=(20, 28, 20), reach_ms=2.6),
        Part(part="decode", latent=(20, 28, 20), batches=(1,), reach_ms=26, reach_bytes=3 * 10**9),
        Part(part="volume", latent=(20, 28, 20), reach_ms=160),
    )),
    Case(name="BraTS", bundle=BRATS, parts=(
        Part(part="step", latent=(36, 44, 28), reach_ms=4.9),
        Part(part="decode", latent=(36, 44, 28), batches=(1,), reach_ms=16),
        Part(part="volume", latent=(36, 44, 28), reach_ms=270),
    )),
    Case(name="MAISI", bundle=MAISI, parts=(
        Part(part="step", latent=(64, 64, 64), reach_ms=5),
        Part(part="decode", latent=(128, 128, 128), batches=(1,), reach_bytes=80 * 10**9, alone=True),
    )),
    Case(name="hippocampus", bundle=lambda shipped: read_bundle(BUNDLE), parts=(
        Part(part="step", latent=(8, 12, 8)),
        Part(part="decode", latent=(8, 12, 8), batches=(1,)),
        Part(part="volume", latent=(8, 12, 8)),
    )),
)  # fmt: skip
