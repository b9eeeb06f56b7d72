"""Export of a one-pass model: the bundle of a GAN or a SPADE VAE-GAN becomes an artifact folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from volcast.runtime.generator_spec import GENERATOR_FORMAT, GeneratorSpec
from volcast.runtime.spec import Axis, Precision

from .artifact import write_artifact
from .bundle_masks import IMAGE_AXES
from .generator_bundle import GeneratorBundle
from .generator_networks import NoiseImage, SpadeConditions, SpadeImage, SpadeStyle
from .networks import MASK
from .programs import CapturedModel, CapturedProgram, capture_program

STAGES = ("capture", "prepare", "decode", "encode", "manifest")


def export_generator(
    bundle: GeneratorBundle,
    folder: Path,
    *,
    precision: Precision = Precision.FP32,
    batch: tuple[int, int] = (1, 64),
    replace: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> GeneratorSpec:
    """Export `bundle` to `folder`, whole or not at all; `progress` is told each of `STAGES` that begins.

    Raises ValueError where the folder exists (and not `replace`) or cannot be written, the batch range is empty, or
    a network cannot be captured.
    """
    own = {
        "format": GENERATOR_FORMAT, "noise_shape": bundle.noise_shape, "image_shape": bundle.image_shape,
    }  # fmt: skip
    return write_artifact(
        bundle, folder, lambda: capture_generator(bundle, batch), GeneratorSpec, own, precision=precision, batch=batch,
        replace=replace, progress=progress,
    )  # fmt: skip


def capture_generator(bundle: GeneratorBundle, batch: tuple[int, int]) -> CapturedModel:
    """`decode`, and with a label map `prepare` and (a VAE's) `encode`, with a free batch and the sizes of training."""
    axes = [Axis(name="batch", minimum=batch[0], maximum=batch[1])]
    noise = {"z": torch.zeros(2, *bundle.noise_shape)} if bundle.noise_shape else {}
    if not bundle.conditions:
        decode = _program(NoiseImage(bundle.network, bundle.sigmoid), noise, ["image"])
        return CapturedModel(programs={"decode": decode}, axes=tuple(axes))
    spatial = bundle.image_shape[1:]
    axes += [
        Axis(name=name, minimum=size, maximum=size) for name, size in zip(IMAGE_AXES, spatial, strict=False)
    ]
    network = SpadeConditions(bundle.network)
    mask = torch.zeros(2, *spatial, dtype=torch.int64)
    with torch.no_grad():
        made = network(mask)
    names = [f"constant_{index}" for index in range(len(made))]
    programs = {"prepare": _program(network, {MASK: mask}, names)}
    constants = dict(zip(names, made, strict=True))
    programs["decode"] = _program(SpadeImage(bundle.network, bundle.sigmoid), noise | constants, ["image"])
    if bundle.noise_shape:
        channels = bundle.network.in_channels
        assert isinstance(channels, int)
        image = torch.zeros(2, channels, *spatial)
        programs["encode"] = _program(SpadeStyle(bundle.network), {"image": image}, ["z_mu", "z_sigma"])
    return CapturedModel(programs=programs, axes=tuple(axes))


def _program(network: nn.Module, examples: Mapping[str, Tensor], names: Sequence[str]) -> CapturedProgram:
    return capture_program(network, examples, {name: {0: "batch"} for name in examples}, names)
