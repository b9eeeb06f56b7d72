"""A bundle's networks as captured, optimised programs with their contracts, before they become ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType

import torch
from monai.networks.nets.spade_autoencoderkl import SPADEAutoencoderKL
from monai.networks.nets.spade_diffusion_model_unet import SPADEDiffusionModelUNet
from torch import Tensor, nn
from torch.fx import GraphModule

from volcast.runtime.spec import TAU, Axis, ConditionSpec, TensorSpec

from .capture import capture
from .graph import count_flops, count_nodes, hint, inputs, is_free, outputs, shape_of, symbol
from .networks import MASK, Control, Decoder, Denoiser, Encoder, plain_modules
from .passes.hoist import hoist
from .passes.phase_conv import phase_conv
from .passes.reuse import FEATURE, reuse
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
    controls: Sequence[Control] = (),
    encodings: Mapping[str, Tensor] = MappingProxyType({}),
    reused: bool = False,
    text_encoder: nn.Module | None = None,
) -> CapturedModel:
    """Capture and optimise every program of a latent (or, without autoencoder, pixel-space) diffusion model.

    `latent_shape` is `(C, *spatial)`, the default size; `batch` the smallest and largest batch to admit; `controls` and
    `encodings` as `Denoiser` takes them; `reused`: with the programs that `passes/reuse` makes of the step.
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
    # SPADE resizes its mask to the sizes of the UNet's levels, and what it makes of it crosses into the step.
    axes += [_scaled(axis, Fraction(1, 2**level), f"{axis.name}_{2**level}")
             for level in range(1, _levels(unet)) for axis in axes[2 : 2 + len(spatial)]]  # fmt: skip
    scale = (1,) * len(spatial)
    rest: dict[str, CapturedProgram] = {}
    if autoencoder is not None:
        spade = isinstance(autoencoder, SPADEAutoencoderKL)
        rest["decode"], scale = capture_decoder(autoencoder, latent_shape, encodings[MASK] if spade else None)
        rest["encode"] = capture_encoder(autoencoder, spatial, scale)
        axes += [
            _scaled(axis, Fraction(s), f"o{i}")
            for i, (axis, s) in enumerate(zip(axes[2:], scale, strict=False))
        ]
    # A label map may be the decoder's alone.
    others = {MASK} - {control.hint for control in controls}
    if isinstance(unet, SPADEDiffusionModelUNet):
        others = set()
    if getattr(unet, "num_class_embeds", None) is None:
        others |= {TAU}  # the network is not told the level to which its low-resolution image was noised
    shown = [condition for condition in conditions if condition.name not in others]
    denoiser = Denoiser(
        plain_modules(unet),
        [condition.name for condition in shown],
        [replace(control, network=plain_modules(control.network)) for control in controls],
        {name: table for name, table in encodings.items() if name not in others},
        text_encoder,
    )
    programs = capture_denoiser(denoiser, latent_shape, shown, multiple, scale, reused) | rest
    named = {size for p in programs.values() for t in (*p.inputs, *p.outputs) for size in t.shape}
    return CapturedModel(programs=programs, axes=tuple(axis for axis in axes if axis.name in named))


def _scaled(axis: Axis, by: Fraction, name: str) -> Axis:
    return Axis(
        name=name,
        minimum=int(axis.minimum * by),
        maximum=int(axis.maximum * by),
        multiple=int(axis.multiple * by),
    )


def capture_denoiser(
    network: Denoiser,
    latent_shape: Sequence[int],
    conditions: Sequence[ConditionSpec],
    multiple: int,
    scale: Sequence[int],
    reused: bool = False,
) -> dict[str, CapturedProgram]:
    """`schedule`, `prepare` (if anything depends on the conditions alone) and `step`.

    `multiple`: of what number the latent's sizes are multiples; `scale`: an image's size over its latent's, an axis;
    `reused`: `step_deep` and `step_shallow` too.
    """
    dims = range(len(latent_shape) - 1)
    latent = {f"d{i}": latent_shape[1 + i] for i in dims}
    small = dict(zip(latent, _capture_sizes(len(dims), multiple), strict=True))

    def with_images(sizes: Mapping[str, int]) -> dict[str, int]:
        return dict(sizes) | {f"o{i}": sizes[f"d{i}"] * scale[i] for i in dims}

    free: dict[str, dict[int, str]] = {
        "x": {0: "batch", **{2 + i: name for i, name in enumerate(latent)}},
        "timesteps": {0: "batch"},
    }
    for condition in conditions:
        named = {1 + axis: size for axis, size in enumerate(condition.shape) if isinstance(size, str)}
        free[condition.name] = {0: "batch"} | named

    def examples(batch: int, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        x = torch.zeros(batch, latent_shape[0], *(sizes[name] for name in latent))
        given = {"x": x, "timesteps": torch.zeros(batch)}
        for condition in conditions:
            shape = [sizes[size] if isinstance(size, str) else size for size in condition.shape]
            given[condition.name] = torch.zeros(batch, *shape, dtype=getattr(torch, condition.dtype))
        return given

    images = {size for condition in conditions for size in condition.shape if size not in latent}
    beside = {f"o{i}": f"d{i}" for i in dims if f"o{i}" in images}
    multiples = dict.fromkeys(latent, multiple) | {
        f"o{i}": multiple * scale[i] for i in dims if f"o{i}" in images
    }
    original = capture(network, examples(2, with_images(small)), free, multiples, beside)
    cut = hoist(phase_conv(single_token_attention(original)))
    axes = _level_axes(original, multiple) | _axes(original, free)
    batch = symbol(shape_of(inputs(original)["x"])[0])
    known = examples(1, with_images(latent))
    original_flops = count_flops(original, list(known.values()))
    (known["row"],) = cut.schedule(known["timesteps"])
    result = {"schedule": _program(cut.schedule, {**axes, batch: "steps"}, ["rows"], known)}
    if cut.prepare is not None:
        constants = cut.prepare(*(known[name] for name in inputs(cut.prepare)))
        names = [name for name in inputs(cut.step) if name.startswith("constant")]
        result["prepare"] = _program(cut.prepare, axes, names, known)
        known |= dict(zip(names, constants, strict=True))
    before = (count_nodes(original), original_flops)
    result["step"] = _program(cut.step, axes, ["out"], known, before)
    if reused:
        parts = reuse(cut.step)
        known[FEATURE] = torch.zeros(1, parts.channels, *latent_shape[1:])
        result["step_deep"] = _program(parts.deep, axes, ["out", FEATURE], known, before)
        result["step_shallow"] = _program(parts.shallow, axes, ["out"], known, before)
    return result


def capture_decoder(
    autoencoder: nn.Module, latent_shape: Sequence[int], encoding: Tensor | None = None
) -> tuple[CapturedProgram, tuple[int, ...]]:
    """`decode`, and by how much it enlarges each spatial size. With `encoding` it takes a label map (`Decoder`)."""
    dims = range(len(latent_shape) - 1)
    sizes = _capture_sizes(len(dims), 2)
    free = {"z": {0: "batch", **{2 + i: f"d{i}" for i in dims}}}
    examples = {"z": torch.zeros(2, latent_shape[0], *sizes)}
    known = {"z": torch.zeros(1, *latent_shape)}
    multiples: dict[str, int] = {}
    if encoding is not None:
        doubled = 2 ** (len(autoencoder.decoder.channels) - 1)  # type: ignore[union-attr, arg-type]
        free[MASK] = {0: "batch", **{1 + i: f"o{i}" for i in dims}}
        examples[MASK] = torch.zeros(2, *(size * doubled for size in sizes), dtype=torch.int64)
        known[MASK] = torch.zeros(1, *(size * doubled for size in latent_shape[1:]), dtype=torch.int64)
        multiples = {f"d{i}": 1 for i in dims} | {f"o{i}": doubled for i in dims}
    network = Decoder(plain_modules(autoencoder), encoding)
    original = capture(
        network, examples, free, multiples, {f"o{i}": f"d{i}" for i in dims} if multiples else {}
    )
    (image,) = outputs(original)
    scale = tuple(hint(large) // small for large, small in zip(shape_of(image)[2:], sizes, strict=True))
    axes = _axes(original, free) | _output_axes(original, "o")
    before = (count_nodes(original), count_flops(original, list(known.values())))
    return _program(phase_conv(original), axes, ["image"], known, before), scale


def capture_encoder(autoencoder: nn.Module, spatial: Sequence[int], scale: Sequence[int]) -> CapturedProgram:
    """`encode`: mean and standard deviation of the latent."""
    channels = _first_channels(autoencoder)
    sizes = [s * block for s, block in zip(scale, _capture_sizes(len(scale), 1), strict=True)]
    free = {"image": {0: "batch", **{2 + i: f"o{i}" for i in range(len(sizes))}}}
    multiples = {f"o{i}": s for i, s in enumerate(scale)}
    original = capture(
        Encoder(plain_modules(autoencoder)), {"image": torch.zeros(2, channels, *sizes)}, free, multiples
    )
    axes = _axes(original, free) | _output_axes(original, "d")
    known = {"image": torch.zeros(1, channels, *(size * s for size, s in zip(spatial, scale, strict=True)))}
    return _program(original, axes, ["z_mu", "z_sigma"][: len(outputs(original))], known)


def capture_program(
    network: nn.Module,
    examples: Mapping[str, Tensor],
    free: Mapping[str, Mapping[int, str]],
    output_names: Sequence[str],
) -> CapturedProgram:
    """A network of few passes: `examples` of its inputs, and of each the names of its free axes.

    FLOPs are told at 1 along these.
    """
    original = capture(network.eval(), examples, free, {})
    known = {name: _single(examples[name], free[name]) for name in inputs(original)}
    before = (count_nodes(original), count_flops(original, list(known.values())))
    return _program(phase_conv(original), _axes(original, free), output_names, known, before)


def _single(example: Tensor, free: Mapping[int, str]) -> Tensor:
    for axis in free:
        example = example.narrow(axis, 0, 1)
    return example.clone()


def _capture_sizes(dims: int, multiple: int) -> list[int]:
    """Sizes for a capture: none equal to another or to one block, which torch would take for fixed."""
    return [multiple * (2 + axis) for axis in range(dims)]


def _program(
    graph: GraphModule,
    axes: Mapping[str, str],
    output_names: Sequence[str],
    known: Mapping[str, Tensor],
    before: tuple[int, int] | None = None,
) -> CapturedProgram:
    """`before` are the nodes and FLOPs as MONAI wrote the network; None where no pass ran or none applies."""
    described = tensor_specs(graph, axes, output_names)
    counts = count_nodes(graph), count_flops(graph, [known[name] for name in inputs(graph)])
    return CapturedProgram(
        graph=graph,
        inputs=described[0],
        outputs=described[1],
        nodes=counts[0],
        nodes_before=(before or counts)[0],
        flops=counts[1],
        flops_before=(before or counts)[1],
    )


def _axes(graph: GraphModule, free: Mapping[str, Mapping[int, str]]) -> dict[str, str]:
    """The axis name of every free size of the inputs, by symbol."""
    return {
        symbol(shape_of(node)[axis]): free[name][axis]
        for name, node in inputs(graph).items()
        for axis, size in enumerate(shape_of(node))
        if is_free(size)
    }


def _level_axes(graph: GraphModule, multiple: int) -> dict[str, str]:
    """The axis name of every size of x divided by 2, 4, .. `multiple`, by symbol."""
    found = {}
    for i, size in enumerate(shape_of(inputs(graph)["x"])[2:]):
        parts = multiple
        while isinstance(size, torch.SymInt) and parts > 1:
            found[str(size.node.expr / parts)] = f"d{i}_{parts}"
            parts //= 2
    return found


def _output_axes(graph: GraphModule, prefix: str) -> dict[str, str]:
    return {
        symbol(size): f"{prefix}{axis}"
        for node in outputs(graph)
        for axis, size in enumerate(shape_of(node)[2:])
        if is_free(size)
    }


def _levels(unet: nn.Module) -> int:
    blocks = unet.down_blocks
    assert isinstance(blocks, nn.ModuleList)
    return len(blocks)


def _first_channels(autoencoder: nn.Module) -> int:
    weight = next(p for p in autoencoder.encoder.parameters() if p.ndim > 2)  # type: ignore[union-attr]
    return int(weight.shape[1])
