"""Device programs of an artifact: `volcast build --target cuda`. Needs no GPU; they hold for every GPU, batch and size.

Each of step, decode and encode is lowered from its ONNX file, goes through the passes of `device_passes`, and is run on
tensors without memory, so that what the engine would refuse is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from volcast.runtime.artifact import MANIFEST, read_artifact
from volcast.runtime.atomic import atomic_folder, sha256
from volcast.runtime.device.memory import shapes
from volcast.runtime.device.program import PROGRAMS, WEIGHTS, DeviceProgram, DeviceProgramName, DevicePrograms
from volcast.runtime.spec import ArtifactSpec, Precision, ProgramSpec

from .device_passes.cast_constants import cast_constants, float32_values
from .device_passes.fold_bias import fold_bias
from .device_passes.fuse_attention import fuse_attention
from .device_passes.fuse_heads import fuse_heads
from .device_passes.fuse_layout import fuse_layout
from .device_passes.fuse_norm import fuse_norm
from .device_passes.fuse_pointwise import fuse_pointwise
from .device_passes.split_concat import split_concat
from .draft import Draft
from .lower import lower

DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
PASSES = (
    fuse_layout, fuse_attention, fuse_heads, fuse_norm, split_concat, fold_bias, fuse_pointwise, cast_constants,
)  # fmt: skip
"""In this order; each is exact up to rounding."""

MATRICES = {"convolution": 1, "transposed_convolution": 1, "input_head": 1, "output_head": 3,
            "upsample_convolution": 1, "linear": 1, "matmul": None, "einsum": None, "concat": None}  # fmt: skip
"""The input of each kind that meets volumes or tokens in a product or copy, None for any; other weights are vectors."""


def build_cuda(
    artifact: Path,
    folder: Path | None = None,
    *,
    precision: Precision | str = Precision.FP16,
    replace: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DevicePrograms:
    """Write the device programs of `artifact` to `folder` (left out: `ARTIFACT/engines/cuda`) and return their list.

    Matrices and convolutions are stored in `precision`, vectors and what is computed from the schedule's row or the
    request's constants alone stay float32; keys and values among them are cast where tokens attend to them. Raises
    ValueError for an operator without device operation, a weight too large for `precision`, a folder that exists (and
    not `replace`) or holds something else.
    """
    precision = Precision(precision)
    place = artifact / "engines" / "cuda" if folder is None else folder
    _check_place(place, replace)
    spec = read_artifact(artifact)
    wanted = [name for name in get_args(DeviceProgramName) if name in spec.programs]
    programs: dict[DeviceProgramName, DeviceProgram] = {}
    weights: dict[str, Tensor] = {}
    for done, name in enumerate(wanted):
        progress(done, len(wanted))
        draft = device_draft(artifact / spec.programs[name].file)
        stored = stored_weights(draft, precision)
        program = draft.program()
        _check(program, stored, spec, spec.programs[name], precision)
        programs[name] = program
        weights |= {f"{name}/{key}": value for key, value in stored.items()}
    progress(len(wanted), len(wanted))
    if folder is None:
        place.parent.mkdir(exist_ok=True)
    with atomic_folder(place, replace=replace) as temporary:
        save_file(weights, temporary / WEIGHTS)
        manifest = DevicePrograms(
            name=spec.name,
            artifact=sha256(artifact / MANIFEST),
            precision=precision.value,
            programs=programs,
            weights_sha256=sha256(temporary / WEIGHTS),
        )
        (temporary / PROGRAMS).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest


def device_draft(path: Path) -> Draft:
    """An ONNX program (step, decode or encode) after all passes, weights float32."""
    draft = lower(path)
    for one in PASSES:
        draft = one(draft)
    return draft


def stored_weights(draft: Draft, precision: Precision) -> dict[str, Tensor]:
    """The draft's weights in the types in which they are stored. Raises ValueError for one that overflows."""
    wide = float32_values(draft)
    dtypes: dict[str, set[torch.dtype]] = {name: set() for name in draft.weights}
    for one in draft.operations:
        keeps = one.outputs[0] in wide
        for place, name in enumerate(one.inputs):
            if name in dtypes:
                matrix = one.kind in MATRICES and MATRICES[one.kind] in (place, None) and not keeps
                dtypes[name].add(DTYPES[precision] if matrix else torch.float32)
    result = {}
    for name, value in draft.weights.items():
        if len(dtypes[name]) > 1:
            raise ValueError(
                f"[build] weight {name} is read in float32 and in {precision}: use --precision fp32"
            )
        dtype = dtypes[name].pop() if dtypes[name] else torch.float32
        stored = value.detach().to(dtype, copy=True).contiguous()
        if not bool(torch.isfinite(stored).all()):
            largest = float(value.abs().max())
            remedy = "use --precision fp32" if precision is Precision.BF16 else "use --precision bf16 or fp32"
            raise ValueError(
                f"[build] weight {name} reaches {largest:g}: too large for {precision}; {remedy}"
            )
        result[name] = stored
    return result


def _check_place(place: Path, replace: bool) -> None:
    if place.exists() and not replace:
        raise ValueError(f"[build] {place} exists: remove it, choose another name, or pass --force")
    if place.is_dir() and not (place / PROGRAMS).is_file() and any(place.iterdir()):
        raise ValueError(
            f"[build] {place} holds no {PROGRAMS}, something else: it is not replaced; choose another name"
        )


def _check(
    program: DeviceProgram, weights: Mapping[str, Tensor], spec: ArtifactSpec, described: ProgramSpec, precision: Precision
) -> None:  # fmt: skip
    """Raise ValueError where the program differs from the manifest's or does not run at the smallest sizes."""
    given = (
        tuple(tensor.name for tensor in described.inputs),
        tuple(tensor.name for tensor in described.outputs),
    )
    if (program.inputs, program.outputs) != given:
        raise ValueError(
            f"[build] {described.file} has other tensors than the manifest says: export it again"
        )
    smallest = {axis.name: -(-axis.minimum // axis.multiple) * axis.multiple for axis in spec.axes}

    def sizes(shape: tuple[int | str, ...]) -> tuple[int, ...]:
        return tuple(smallest[size] if isinstance(size, str) else size for size in shape)

    inputs = {
        tensor.name: (
            sizes(tensor.shape),
            DTYPES[precision]
            if len(tensor.shape) > 2 and tensor.dtype != "int64"
            else getattr(torch, tensor.dtype),
        )
        for tensor in described.inputs
    }
    try:
        found = shapes(program, weights, inputs)
    except ValueError as error:
        other = "" if precision is Precision.FP32 else "--precision fp32 or "
        remedy = f"use {other}another engine (--engine onnxruntime)"
        raise ValueError(f"[build] {described.file}: {error}; {remedy}") from error
    for tensor in described.outputs:
        if found[tensor.name][0] != sizes(tensor.shape):
            raise ValueError(
                f"[build] {described.file}: {tensor.name} has shape {found[tensor.name][0]} where the manifest says "
                f"{sizes(tensor.shape)}: export it again"
            )
