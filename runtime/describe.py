"""What `volcast info` says about an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .generator_spec import GeneratorSpec
from .spec import ArtifactSpec, ConditionField, Manifest, ProgramSpec, Ratio, TensorSpec
from .token_spec import TokenSpec


def as_dict(spec: Manifest, folder: Path) -> dict[str, Any]:
    """The manifest as JSON values, with `bytes` for the size of every file."""
    return {**spec.model_dump(mode="json"), "bytes": _bytes(spec, folder)}


def as_text(spec: Manifest, folder: Path) -> str:
    """The same for a reader, one fact a line."""
    sizes = _bytes(spec, folder)
    lines = [
        f"{spec.name}: weights {spec.precision}, {sum(sizes.values()) / 1e6:.1f} MB, format {spec.format}",
        *_model(spec),
        "",
        f"{'program':<9} {'nodes':>12} {'GFLOP':>17} {'MB':>7}  inputs -> outputs",
    ]
    lines += [_program(name, program, sizes[program.file]) for name, program in spec.programs.items()]
    lines += ["", "axes"]
    for axis in spec.axes:
        multiple = f", multiples of {axis.multiple}" if axis.multiple > 1 else ""
        lines.append(f"  {axis.name}: {axis.minimum}..{axis.maximum}{multiple}")
    lines += ["", "conditions" if spec.conditions else "no conditions"]
    for condition in spec.conditions:
        guidance = (
            ""
            if condition.unconditional is None
            else f", guidance (unconditional {condition.unconditional:g})"
        )
        lines.append(f"  {condition.name}: {condition.dtype} {_shape(condition.shape)}{guidance}")
        lines += [_described(condition.description)] if condition.description else []
        lines += [_field(field) for field in condition.fields]
    lines += ["", "provenance"] if spec.provenance else []
    lines += [f"  {key}: {value}" for key, value in spec.provenance.items()]
    return "\n".join(lines)


def _model(spec: Manifest) -> list[str]:
    voxels = f"voxels of {_shape(spec.spacing_mm)} mm"
    if isinstance(spec, TokenSpec):
        order = "in an order of its own" if spec.order else "by raster scan"
        return [
            f"tokens {_shape(spec.token_shape)} {order}, {spec.num_codes} codes, {spec.layers} layers, {voxels}"
        ]
    if isinstance(spec, GeneratorSpec):
        noise = f"noise {_shape(spec.noise_shape)}" if spec.noise_shape else "no noise"
        return [f"one pass: {noise} to an image {_shape(spec.image_shape)}, {voxels}"]
    assert isinstance(spec, ArtifactSpec)
    schedule = spec.scheduler.noise_schedule
    how = f"{spec.scheduler.steps} of {schedule.num_train_timesteps} steps, {schedule.schedule}"
    lines = [
        f"latent {_shape(spec.latent_shape)}, {voxels}, scale factor {spec.scale_factor:g}",
        f"scheduler {spec.scheduler.scheduler}, {how}, {spec.scheduler.prediction_type}",
    ]
    if spec.intensity is not None:
        low, high = spec.intensity.written
        lines.append(f"intensities {low:g}..{high:g} {spec.intensity.unit}, clipped")
    return lines


def _program(name: str, program: ProgramSpec, size: int) -> str:
    nodes = f"{program.nodes_before} > {program.nodes}"
    flops = f"{program.flops_before / 1e9:.4g} > {program.flops / 1e9:.4g}"
    tensors = " -> ".join(", ".join(_tensor(t) for t in side) for side in (program.inputs, program.outputs))
    return f"{name:<9} {nodes:>12} {flops:>17} {size / 1e6:>7.1f}  {tensors}"


def _tensor(tensor: TensorSpec) -> str:
    return f"{tensor.name}[{', '.join(str(size) for size in tensor.shape)}]"


def _field(field: ConditionField) -> str:
    default = "by the other fields" if isinstance(field.default, Ratio) else f"{field.default:g}"
    text = f" {field.description}" if field.description else ""
    text += f" (the network is shown {field.factor:g} times it)" if field.factor != 1 else ""
    return f"    {field.name}: {field.minimum:g}..{field.maximum:g}, default {default}{text}"


def _described(text: str) -> str:
    return f"    {text}"


def _shape(sizes: tuple[object, ...]) -> str:
    return " x ".join(str(size) for size in sizes)


def _bytes(spec: Manifest, folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in spec.files}
