"""Export of a one-pass model: the bundle of a GAN or a SPADE VAE-GAN becomes an artifact folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from volcast.runtime.artifact import MANIFEST, digests
from volcast.runtime.atomic import atomic_folder
from volcast.runtime.generator_spec import GENERATOR_FORMAT, GeneratorSpec
from volcast.runtime.spec import Axis, Precision

from .artifact import check_batch, tool_versions, write_programs
from .bundle_masks import IMAGE_AXES
from .capture import capture
from .generator_bundle import GeneratorBundle
from .generator_networks import NoiseImage, SpadeConditions, SpadeImage, SpadeStyle
from .graph import count_flops, count_nodes, inputs, is_free, outputs, shape_of, symbol
from .networks import MASK
from .passes.phase_conv import phase_conv
from .programs import CapturedModel, CapturedProgram
from .to_onnx import tensor_specs

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
    check_batch(batch)
    with atomic_folder(folder, replace=replace) as temporary:
        progress("capture")
        model = capture_generator(bundle, batch)
        versions = tool_versions()
        programs = write_programs(model, temporary, precision, versions, progress)
        progress("manifest")
        spec = GeneratorSpec(
            format=GENERATOR_FORMAT,
            name=bundle.name,
            precision=precision,
            axes=model.axes,
            programs=programs,  # type: ignore[arg-type]
            spacing_mm=bundle.spacing_mm,
            conditions=bundle.conditions,
            noise_shape=bundle.noise_shape,
            image_shape=bundle.image_shape,
            provenance={**bundle.provenance, **versions},
            files=digests(temporary),
        )
        (temporary / MANIFEST).write_text(spec.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return spec


def capture_generator(bundle: GeneratorBundle, batch: tuple[int, int]) -> CapturedModel:
    """`decode`, and with a label map `prepare` and (a VAE's) `encode`, with a free batch and the sizes of training."""
    axes = [Axis(name="batch", minimum=batch[0], maximum=batch[1])]
    noise = {"z": torch.zeros(2, *bundle.noise_shape)} if bundle.noise_shape else {}
    if not bundle.conditions:
        decode = _captured(NoiseImage(bundle.network, bundle.sigmoid), noise, ["image"])
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
    programs = {"prepare": _captured(network, {MASK: mask}, names)}
    constants = dict(zip(names, made, strict=True))
    programs["decode"] = _captured(SpadeImage(bundle.network, bundle.sigmoid), noise | constants, ["image"])
    if bundle.noise_shape:
        channels = bundle.network.in_channels
        assert isinstance(channels, int)
        image = torch.zeros(2, channels, *spatial)
        programs["encode"] = _captured(SpadeStyle(bundle.network), {"image": image}, ["z_mu", "z_sigma"])
    return CapturedModel(programs=programs, axes=tuple(axes))


def _captured(network: nn.Module, examples: Mapping[str, Tensor], names: Sequence[str]) -> CapturedProgram:
    original = capture(network.eval(), examples, {name: {0: "batch"} for name in examples}, {})
    graph = phase_conv(original)
    shapes = [shape_of(node) for node in (*inputs(graph).values(), *outputs(graph))]
    axes = {symbol(shape[0]): "batch" for shape in shapes if is_free(shape[0])}
    described = tensor_specs(graph, axes, names)
    single = [examples[name][:1].clone() for name in inputs(graph)]
    return CapturedProgram(
        graph=graph,
        inputs=described[0],
        outputs=described[1],
        nodes=count_nodes(graph),
        nodes_before=count_nodes(original),
        flops=count_flops(graph, single),
        flops_before=count_flops(original, single),
    )
