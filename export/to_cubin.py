"""Ahead-of-time cubins of the kernels that an artifact can use: `volcast build --target cubin`.

Needs Triton, which brings its assembler; no GPU, no CUDA toolkit. The device that runs the cubins needs neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from volcast.kernels.compile_triton import CAPABILITIES, Cubin, compile_launch, is_aligned
from volcast.kernels.launch_triton import Launch
from volcast.runtime.artifact import MANIFEST, read_artifact
from volcast.runtime.atomic import atomic_folder, sha256
from volcast.runtime.cubins import (
    CUBIN_FORMAT,
    CUBINS,
    CubinFile,
    CubinManifest,
    KernelSpec,
    LaunchSpec,
    TensorArgument,
    UseSpec,
)
from volcast.runtime.sizes import latent_sizes
from volcast.runtime.spec import ArtifactSpec, Precision

from .kernel_launches import use_launches
from .kernel_uses import KernelUse, kernel_uses, output_shape

DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


def build_cubins(
    artifact: Path,
    folder: Path,
    capabilities: Sequence[int],
    *,
    precision: Precision = Precision.FP16,
    batch: int = 1,
    size: Sequence[int] | None = None,
    replace: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CubinManifest:
    """Compile every kernel that `artifact` can use at one batch and latent size, for each compute capability.

    Raises ValueError for a capability that is not known, sizes that the artifact does not allow, a folder that exists
    (and not `replace`), before anything is compiled.
    """
    unknown = [sm for sm in capabilities if sm not in CAPABILITIES]
    if unknown or not capabilities:
        known = ", ".join(map(str, CAPABILITIES))
        raise ValueError(f"[build] sm={', '.join(map(str, unknown)) or 'none'}: need some of {known}")
    if folder.exists() and replace and not (folder / CUBINS).is_file() and any(folder.iterdir()):
        raise ValueError(
            f"[build] {folder} holds no {CUBINS}, something else: it is not replaced; choose another name"
        )
    spec = read_artifact(artifact)
    uses = artifact_uses(artifact, spec, batch, size)
    devices = sorted(set(capabilities))
    left_out: dict[int, str] = {}
    launches: dict[int, list[list[Launch]]] = {sm: [] for sm in devices}
    for sm in devices:
        for place, use in enumerate(uses):
            try:
                launches[sm].append(use_launches(use, DTYPES[precision], sm))
            except ValueError as error:  # a contract that its channels or heads do not meet
                launches[sm].append([])
                left_out[place] = str(error)
    wanted: dict[str, dict[int, Launch]] = {}
    for sm in devices:
        for launch in (launch for some in launches[sm] for launch in some):
            wanted.setdefault(_key(launch), {})[sm] = launch
    total, done = sum(map(len, wanted.values())), 0
    if folder.parent == artifact / "engines":
        folder.parent.mkdir(exist_ok=True)
    with atomic_folder(folder, replace=replace) as temporary:
        kernels: dict[str, KernelSpec] = {}
        for key, by_device in wanted.items():
            built = {}
            for sm, launch in by_device.items():
                built[sm] = compile_launch(launch, sm)
                done += 1
                progress(done, total)
            kernels[key] = _write(temporary, key, launch, built)
        manifest = CubinManifest(
            format=CUBIN_FORMAT,
            name=spec.name,
            artifact=sha256(artifact / MANIFEST),
            precision=precision.value,
            batch=batch,
            latent_shape=(spec.latent_shape[0], *latent_sizes(spec, size)[0]),
            triton_version=version("triton"),
            kernels=kernels,
            uses=tuple(
                UseSpec(
                    program=use.program,
                    node=use.node,
                    operation=use.operation,
                    launches={f"sm_{sm}": _use(launches[sm][place]) for sm in devices},
                    left_out=left_out.get(place),
                )
                for place, use in enumerate(uses)
            ),
        )  # fmt: skip
        (temporary / CUBINS).write_text(manifest.model_dump_json(indent=1))
    return manifest


def artifact_uses(
    artifact: Path, spec: ArtifactSpec, batch: int, size: Sequence[int] | None = None
) -> list[KernelUse]:
    """Where step, decode and encode can use a kernel, at one batch and latent size; and the sampler's update."""
    if not 1 <= batch <= spec.axis("batch").maximum:
        raise ValueError(f"[build] batch={batch}: need 1..{spec.axis('batch').maximum}")
    spatial, sizes = latent_sizes(spec, size, "build")
    # An axis of a condition (tokens, say) is no part of a kernel's constants: any allowed size describes it.
    sizes = {axis.name: axis.minimum for axis in spec.axes} | sizes | {"batch": batch}
    found = kernel_uses(artifact / spec.programs["step"].file, "step", sizes)
    if "decode" in spec.programs:
        decode = artifact / spec.programs["decode"].file
        found += kernel_uses(decode, "decode", sizes)
        if "encode" in spec.programs:
            image = spec.programs["encode"].inputs[0].shape
            named = zip(image, output_shape(decode, sizes), strict=True)
            sizes |= {axis: length for axis, length in named if isinstance(axis, str)}
            found += kernel_uses(artifact / spec.programs["encode"].file, "encode", sizes)
    latent = (batch, spec.latent_shape[0], *spatial)
    # The sampler's update, without and with guidance: a request needs one of them.
    return found + [
        KernelUse(program="sampler", node="x", operation=operation, shapes={"x": latent},
                  settings={"steps": spec.scheduler.steps})
        for operation in ("sampler_step", "sampler_step_guided")
    ]  # fmt: skip


def _key(launch: Launch) -> str:
    """Equal for launches that one cubin serves."""
    types = {
        name: f"{value.dtype} {is_aligned(value)}" if isinstance(value, Tensor) else type(value).__name__
        for name, value in launch.arguments.items()
    }
    parts = [types, _plain(launch.constants), launch.options()]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{launch.name}-{digest[:16]}"


def _plain(constants: Any) -> dict[str, Any]:
    return {
        key: value if isinstance(value, bool | int | float | str | None) else str(value)
        for key, value in constants.items()
    }


def _write(folder: Path, key: str, launch: Launch, built: dict[int, Cubin]) -> KernelSpec:
    files = {}
    for sm, cubin in built.items():
        path = folder / f"sm_{sm}" / f"{key}.cubin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cubin.data)
        files[f"sm_{sm}"] = CubinFile(
            file=f"sm_{sm}/{path.name}", sha256=cubin.sha256, registers=cubin.registers,
            spill_bytes=cubin.spill_bytes, shared_bytes=cubin.shared_bytes, scratch_bytes=cubin.scratch_bytes,
        )  # fmt: skip
    one = next(iter(built.values()))
    return KernelSpec(
        kernel=launch.name, entry=one.entry, constants=_plain(launch.constants), signature=one.signature,
        threads=one.threads, files=files,
    )  # fmt: skip


def _use(launches: Sequence[Launch]) -> tuple[LaunchSpec, ...]:
    buffers: dict[int, int] = {}

    def argument(view: Tensor) -> TensorArgument:
        storage = view.untyped_storage()._cdata
        return TensorArgument(
            buffer=buffers.setdefault(storage, len(buffers)), dtype=str(view.dtype).removeprefix("torch."),
            shape=tuple(view.shape), strides=view.stride(), offset=int(view.storage_offset()),
        )  # fmt: skip

    return tuple(
        LaunchSpec(
            kernel=_key(launch),
            grid=launch.grid,
            tensors={
                name: argument(value) for name, value in launch.arguments.items() if isinstance(value, Tensor)
            },
            numbers={
                name: value for name, value in launch.arguments.items() if isinstance(value, int | float)
            },
        )
        for launch in launches
    )
