"""A bundle's networks as captured, optimised programs with their contracts, before they become ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from volcast.runtime.spec import Axis, ConditionSpec, TensorSpec

from .capture import capture
from .graph import count_flops, count_nodes, hint, inputs, is_free, outputs, shape_of, symbol
from .networks import Decoder, Denoiser, Encoder, plain_modules
from .passes.hoist import hoist
from .passes.phase_conv import phase_conv
from .passes.single_token_attention import single_token_attention
from .to_onnx import tensor_specs

PASSES = ("single_token_attention", "phase_conv", "hoist")
LARGEST = 1024
"""The largest latent size that a manifest admits along an axis."""


@dataclass(frozen=True, kw_only=True)
class CapturedProgram:
    """One program: its graph, its tensors, and its size before and after the passes (ProgramSpec's units)."""

    graph: GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: int
    nodes_before: int
    flops: int
    flops_before: int


@dataclass(frozen=True, kw_only=True)
class CapturedModel:
    """All programs of a model, by name, and the axes that their tensors name."""

    programs: dict[str, CapturedProgram]
    axes: tuple[Axis, ...]


def capture_model(
    unet: nn.Module,
    autoencoder: nn.Module | None,
    latent_shape: Sequence[int],
    conditions: Sequence[ConditionSpec],
    batch: tuple[int, int],
) -> CapturedModel:
    """Capture and optimise every program of a latent (or, without autoencoder, pixel-space) diffusion model.

    `latent_shape` is `(C, *spatial)`, the default size; `batch` the smallest and largest batch to admit.
    """
    spatial = tuple(latent_shape[1:])
    multiple = 2 ** (_levels(unet) - 1)
    axes = [
        Axis(name="batch", minimum=batch[0], maximum=batch[1]),
        Axis(name="steps", minimum=1, maximum=10**6),
    ]
    axes += [
        Axis(
            name=f"d{i}",
            minimum=multiple,
            maximum=max(size, LARGEST // multiple * multiple),
            multiple=multiple,
        )
        for i, size in enumerate(spatial)
    ]
    programs = capture_denoiser(unet, latent_shape, conditions, multiple)
    if autoencoder is not None:
        decoder, scale = capture_decoder(autoencoder, latent_shape)
        programs["decode"] = decoder
        programs["encode"] = capture_encoder(autoencoder, spatial, scale)
        axes += [
            Axis(name=f"o{i}", minimum=axis.minimum * s, maximum=axis.maximum * s, multiple=axis.multiple * s)
            for i, (axis, s) in enumerate(zip(axes[2:], scale, strict=True))
        ]
    named = {size for p in programs.values() for t in (*p.inputs, *p.outputs) for size in t.shape}
    return CapturedModel(programs=programs, axes=tuple(axis for axis in axes if axis.name in named))


def capture_denoiser(
    unet: nn.Module, latent_shape: Sequence[int], conditions: Sequence[ConditionSpec], multiple: int
) -> dict[str, CapturedProgram]:
    """`schedule`, `prepare` (if anything depends on the conditions alone) and `step`."""
    spatial = {f"d{i}": size for i, size in enumerate(latent_shape[1:])}
    examples = {"x": torch.zeros(2, *latent_shape), "timesteps": torch.zeros(2)}
    free: dict[str, dict[int, str]] = {
        "x": {0: "batch", **{2 + i: name for i, name in enumerate(spatial)}},
        "timesteps": {0: "batch"},
    }
    for condition in conditions:
        shape = [spatial[size] if isinstance(size, str) else size for size in condition.shape]
        examples[condition.name] = torch.zeros(2, *shape, dtype=getattr(torch, condition.dtype))
        free[condition.name] = {0: "batch"} | {
            1 + axis: size for axis, size in enumerate(condition.shape) if isinstance(size, str)
        }
    names = [condition.name for condition in conditions]
    network = Denoiser(plain_modules(unet), names)
    original = capture(network, examples, free, {name: multiple for name in spatial})
    cut = hoist(phase_conv(single_token_attention(original)))
    axes = _axes(original, free)
    (x_symbol,) = {symbol(shape_of(inputs(original)["x"])[0])}
    one = {name: value[:1] for name, value in examples.items()}
    rows, *_ = cut.schedule(torch.zeros(1))
    constants = cut.prepare(*(one[name] for name in inputs(cut.prepare))) if cut.prepare is not None else ()
    prepared = ["constants", *[f"constant_{i}" for i in range(len(constants))]]
    if constants and not any(name == "constants" for name in inputs(cut.step)):
        prepared = prepared[1:]
    prepared = prepared[: len(constants)]
    crossing = {"row": rows, **dict(zip(prepared, constants, strict=True)), **one}
    result = {
        "schedule": _program(cut.schedule, {**axes, x_symbol: "steps"}, ["rows"], [torch.zeros(1)]),
        "step": _program(
            cut.step, axes, ["out"], [crossing[name] for name in inputs(cut.step)], original, one
        ),
    }
    if cut.prepare is not None:
        given = [one[name] for name in inputs(cut.prepare)]
        result["prepare"] = _program(cut.prepare, axes, prepared, given)
    return result


def capture_decoder(
    autoencoder: nn.Module, latent_shape: Sequence[int]
) -> tuple[CapturedProgram, tuple[int, ...]]:
    """`decode`, and by how much it enlarges each spatial size."""
    spatial = tuple(latent_shape[1:])
    examples = {"z": torch.zeros(2, *latent_shape)}
    free = {"z": {0: "batch", **{2 + i: f"d{i}" for i in range(len(spatial))}}}
    original = capture(Decoder(plain_modules(autoencoder)), examples, free, {})
    (image,) = outputs(original)
    sizes = tuple(hint(size) for size in shape_of(image)[2:])
    scale = tuple(size // small for size, small in zip(sizes, spatial, strict=True))
    axes = _axes(original, free) | _output_axes(original, "o")
    one = {"z": examples["z"][:1]}
    return _program(phase_conv(original), axes, ["image"], list(one.values()), original, one), scale


def capture_encoder(autoencoder: nn.Module, spatial: Sequence[int], scale: Sequence[int]) -> CapturedProgram:
    """`encode`: mean and standard deviation of the latent."""
    sizes = [size * s for size, s in zip(spatial, scale, strict=True)]
    channels = getattr(autoencoder, "in_channels", None) or _first_channels(autoencoder)
    examples = {"image": torch.zeros(2, channels, *sizes)}
    free = {"image": {0: "batch", **{2 + i: f"o{i}" for i in range(len(sizes))}}}
    original = capture(
        Encoder(plain_modules(autoencoder)), examples, free, {f"o{i}": s for i, s in enumerate(scale)}
    )
    axes = _axes(original, free) | _output_axes(original, "d")
    one = {"image": examples["image"][:1]}
    return _program(original, axes, ["z_mu", "z_sigma"], list(one.values()), original, one)


def _program(
    graph: GraphModule,
    axes: Mapping[str, str],
    output_names: Sequence[str],
    examples: Sequence[Tensor],
    original: GraphModule | None = None,
    original_examples: Mapping[str, Tensor] | None = None,
) -> CapturedProgram:
    """`original` is the network as MONAI wrote it, for the counts; None where the program is only a part of it."""
    described = tensor_specs(graph, axes, output_names)
    nodes, flops = count_nodes(graph), count_flops(graph, examples)
    before = (nodes, flops)
    if original is not None and original_examples is not None:
        before = count_nodes(original), count_flops(original, original_examples.values())
    return CapturedProgram(
        graph=graph,
        inputs=described[0],
        outputs=described[1],
        nodes=nodes,
        nodes_before=before[0],
        flops=flops,
        flops_before=before[1],
    )


def _axes(graph: GraphModule, free: Mapping[str, Mapping[int, str]]) -> dict[str, str]:
    """The axis name of every free size of the inputs, by symbol."""
    return {
        symbol(shape_of(node)[axis]): free[name][axis]
        for name, node in inputs(graph).items()
        for axis, size in enumerate(shape_of(node))
        if is_free(size)
    }


def _output_axes(graph: GraphModule, prefix: str) -> dict[str, str]:
    return {
        symbol(size): f"{prefix}{axis}"
        for node in outputs(graph)
        for axis, size in enumerate(shape_of(node)[2:])
        if is_free(size)
    }


def _levels(unet: nn.Module) -> int:
    return len(unet.down_blocks)  # type: ignore[arg-type]


def _first_channels(autoencoder: nn.Module) -> int:
    weight = next(p for p in autoencoder.encoder.parameters() if p.ndim > 2)  # type: ignore[union-attr]
    return int(weight.shape[1])
