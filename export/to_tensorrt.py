"""TensorRT plans of an artifact: `volcast build --target tensorrt|tensorrt-rtx`.

Every program is typed, its sizes are bounded, its largest tensor is computed, and only then is it built. Plans for
TensorRT-RTX need no GPU; TensorRT tunes on the one that is here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256 as digest_of
from pathlib import Path

import onnx_ir

from volcast.runtime.artifact import MANIFEST, read_artifact
from volcast.runtime.atomic import atomic_folder, sha256
from volcast.runtime.default_artifact import cache_folder
from volcast.runtime.gpu import local_gpu
from volcast.runtime.plans import (
    PLANS,
    Compatibility,
    PlanFile,
    PlanManifest,
    ProgramName,
    Range,
    Target,
    Weight,
    planned_programs,
    source_digest,
)
from volcast.runtime.spec import ArtifactSpec, Precision, ProgramSpec
from volcast.runtime.tensorrt_library import Library, open_library

from .tensorrt_network import PlanSettings, build_plan
from .tensorrt_profile import Sizes, as_text, axis_ranges, one_by_one, slab_ranges
from .tensorrt_shapes import check_elements
from .tensorrt_strip import write_skeleton
from .tensorrt_types import typed

TURING = 75
Progress = Callable[[ProgramName, str, int, int], None]
"""(program, what is being done to it, steps done, steps to do)."""


def build_tensorrt(
    artifact: Path,
    target: Target,
    folder: Path | None = None,
    *,
    capabilities: Sequence[int] = (),
    precision: Precision | str = Precision.FP16,
    batch: tuple[int, int] | None = None,
    size: Sizes | None = None,
    compatibility: Compatibility = "none",
    version_compatible: bool = False,
    strip: bool = False,
    replace: bool = False,
    progress: Progress = lambda program, phase, done, total: None,
) -> tuple[Path, PlanManifest]:
    """Write a plan for each program of `artifact` to `folder` (left out: `plans_folder`) and return that and their manifest.

    The decoder's segments for slabs become plans too.

    Args:
        capabilities: compute capabilities, 86 for 8.6, that TensorRT-RTX builds for; left out: all from 8.0 on.
        precision: of products and volumes; sums, norms and softmax are float32, and so is `schedule` but for 7.5.
        batch, size: see `axis_ranges`.
        compatibility: further GPUs that TensorRT's plans run on; `version_compatible`: later versions of TensorRT.
        strip: leave the weights in the artifact, to be put in when a plan is loaded.

    Raises ValueError, before anything is written, for what the library or its GPUs cannot take.
    """
    precision = Precision(precision)
    library = open_library(target)
    devices, gpu = _devices(library, capabilities, precision, compatibility, version_compatible)
    place = plans_folder(artifact, target, library, devices, compatibility) if folder is None else folder
    check_place(place, replace)
    spec = read_artifact(artifact)
    ranges = axis_ranges(spec, batch, size)
    slabs = slab_ranges(spec, ranges)
    programs = planned_programs(spec)
    held = {
        name: slabs[name] if name in slabs else _held(name, one, ranges) for name, one in programs.items()
    }
    for name, program in programs.items():
        sizes = {axis: one.maximum for axis, one in held[name].items()}
        check_elements(artifact / program.file, name, program, sizes, precision is not Precision.FP32)
    settings = PlanSettings(
        capabilities=devices, compatibility=compatibility, version_compatible=version_compatible, strip=strip,
        timing_cache=cache_folder() / f"{target}-{library.version}-sm{devices[0]}.timing",
    )  # fmt: skip
    if folder is None:
        place.parent.mkdir(exist_ok=True)
    with atomic_folder(place, replace=replace) as temporary:
        built = {
            name: _build(library, artifact, spec, name, program, _typed_as(name, precision, devices), held[name],
                         settings, temporary, progress)
            for name, program in programs.items()
        }  # fmt: skip
        manifest = PlanManifest(
            name=spec.name, target=target, version=library.version, artifact=sha256(artifact / MANIFEST),
            precision=precision, capabilities=devices, gpu=gpu, compatibility=compatibility,
            version_compatible=version_compatible, programs=built,
            batch=None if batch is None else f"{batch[0]}:{batch[1]}", size=None if size is None else as_text(size),
        )  # fmt: skip
        (temporary / PLANS).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return place, manifest


def plans_folder(
    artifact: Path, target: Target, library: Library, devices: Sequence[int], compatibility: Compatibility
) -> Path:
    """Where plans go when no folder is named: beside those for other devices."""
    if target == "tensorrt-rtx" and tuple(devices) == _modern(library):
        return artifact / "engines" / target
    suffix = compatibility if compatibility == "ampere-plus" else "-".join(f"sm{one}" for one in devices)
    return artifact / "engines" / f"{target}-{suffix}"


def check_place(place: Path, replace: bool) -> None:
    """Raise ValueError where `place` holds something that a build must not replace."""
    if place.exists() and not replace:
        raise ValueError(f"[build] {place} exists: remove it, choose another name, or pass --force")
    if place.is_dir() and not (place / PLANS).is_file() and any(place.iterdir()):
        raise ValueError(
            f"[build] {place} holds no {PLANS}, something else: it is not replaced; choose another name"
        )


def _devices(
    library: Library,
    wanted: Sequence[int],
    precision: Precision,
    compatibility: Compatibility,
    versions: bool,
) -> tuple[tuple[int, ...], str]:
    """The compute capabilities to build for, and the name of the GPU that it is done on, if one is needed."""
    if library.target == "tensorrt":
        if wanted:
            raise ValueError(
                "[build] --sm is for --target tensorrt-rtx and cubin: TensorRT builds for the GPU that is here, and "
                "with --compatibility for others"
            )
        gpu = local_gpu("tensorrt")
        if compatibility == "ampere-plus" and gpu.capability < 80:
            raise ValueError(
                f"[build] --compatibility ampere-plus: {gpu.name} is older than Ampere; leave it out"
            )
        return (gpu.capability,), gpu.name
    if compatibility != "none" or versions:
        raise ValueError(
            "[build] --compatibility and --version-compatible are for --target tensorrt: plans of TensorRT-RTX name "
            "their devices with --sm and hold for its own version"
        )
    known = library.capabilities()
    devices = tuple(sorted(set(wanted))) or _modern(library)
    for one in devices:
        if one not in known:
            raise ValueError(
                f"[build] --sm {one}: {library.target} {library.version} builds for {', '.join(map(str, known))}; use "
                "--target tensorrt on that GPU"
            )
    if TURING in devices:
        if len(devices) > 1:
            raise ValueError(
                f"[build] --sm {TURING} with others: Turing takes plans of its own; build it alone"
            )
        if precision is not Precision.FP16:
            raise ValueError(
                f"[build] --sm {TURING} --precision {precision}: TensorRT-RTX has no such products on Turing; use fp16"
            )
    return devices, ""


def _modern(library: Library) -> tuple[int, ...]:
    return tuple(one for one in library.capabilities() if one > TURING)


def _typed_as(name: ProgramName, precision: Precision, devices: Sequence[int]) -> Precision:
    """`schedule` runs once a schedule on a few numbers, and what it gets wrong every step gets wrong."""
    return Precision.FP32 if name == "schedule" and TURING not in devices else precision


def _held(name: ProgramName, program: ProgramSpec, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Those of the program's own axes."""
    named = {size for tensor in program.inputs for size in tensor.shape if isinstance(size, str)}
    sizes = one_by_one(ranges) if name in ("decode", "encode") else ranges
    return {axis: one for axis, one in sizes.items() if axis in named}


def _build(
    library: Library, artifact: Path, spec: ArtifactSpec, name: ProgramName, program: ProgramSpec,
    precision: Precision, held: dict[str, Range], settings: PlanSettings, folder: Path, progress: Progress,
) -> PlanFile:  # fmt: skip
    source = artifact / program.file
    weights: tuple[Weight, ...] = ()
    progress(name, "types", 0, 1)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = source
        model = onnx_ir.load(source)
        typed(model, precision)
        constants = (one.const_value for one in model.graph.initializers.values())
        weight_bytes = sum(0 if one is None else one.nbytes for one in constants)
        if precision is not Precision.FP32 or settings.strip:
            path = Path(scratch) / source.name
            if settings.strip:
                weights = write_skeleton(model, path)
            else:
                # Without weights of 2 GB in one protocol buffer, which ends there.
                onnx_ir.save(model, path, external_data=f"{path.name}.data")
        plan, scratch_bytes = build_plan(
            library, path, program, held, settings, lambda *steps: progress(name, *steps)
        )
        skeleton = path.read_bytes() if settings.strip else None
    (folder / f"{name}.plan").write_bytes(plan)
    if skeleton is not None:
        (folder / f"{name}.onnx").write_bytes(skeleton)
    return PlanFile(
        file=f"{name}.plan", sha256=digest_of(plan).hexdigest(), bytes=len(plan), source=source_digest(spec, name),
        ranges=held, weight_bytes=weight_bytes, scratch_bytes=scratch_bytes, weights=weights,
        skeleton=None if skeleton is None else f"{name}.onnx",
        skeleton_sha256=None if skeleton is None else digest_of(skeleton).hexdigest(),
    )  # fmt: skip
