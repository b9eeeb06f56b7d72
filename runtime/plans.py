"""The manifest of TensorRT plans: what `volcast build --target tensorrt|tensorrt-rtx` writes and the engines read.

A folder holds `plans.json` and one plan for each program, the decoder's segments for slabs included. A plan is executable content: nothing of it is handed to a
library before its digest, its origin and the GPU have been checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from .frozen import Frozen, Identifier, PositiveInt
from .spec import ArtifactSpec, Precision, ProgramSpec

PLANS = "plans.json"
PLAN_FORMAT = 1
Target = Literal["tensorrt", "tensorrt-rtx"]
Compatibility = Literal["none", "same-capability", "ampere-plus"]
ProgramName = Annotated[str, Field(pattern=r"^(schedule|prepare|step|encode|decode(_[0-9]{2,4})?)$")]
"""Of a program, or of a segment of `decode`: `decode_07`."""
_ORDER: tuple[Literal["schedule", "prepare", "step", "decode", "encode"], ...] = (
    "schedule", "prepare", "step", "decode", "encode",
)  # fmt: skip
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Version = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+){1,4}$")]
Capability = Annotated[int, Field(ge=50, le=999)]


class Range(Frozen):
    """The sizes of one axis that a plan takes, and the one that it was tuned for."""

    minimum: PositiveInt
    optimum: PositiveInt
    maximum: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.minimum <= self.optimum <= self.maximum:
            raise ValueError(f"{self} is not ascending")
        return self

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return str(self.optimum)
        return f"{self.minimum}:{self.optimum}:{self.maximum}"


class Weight(Frozen):
    """A weight that a stripped plan lacks: its name in the skeleton, the artifact's initializer, the type to round to."""

    name: Annotated[str, Field(min_length=1, max_length=1000)]
    source: Annotated[str, Field(min_length=1, max_length=1000)]
    dtype: Literal["float32", "float16", "bfloat16"]


class PlanFile(Frozen):
    """One program's plan. `source` is the sha256 of its ONNX file; `ranges` are by the axis' name.

    `weight_bytes` and, between its layers at the largest sizes, `scratch_bytes` are what it takes on the device; None:
    the library did not tell. `skeleton`, of a stripped plan: the typed ONNX program, whose `weights` lie in the artifact.
    """

    file: Annotated[str, Field(pattern=r"^[a-z]+(_[0-9]+)?\.plan$")]
    sha256: Digest
    bytes: PositiveInt
    source: Digest
    ranges: dict[Identifier, Range]
    weight_bytes: Annotated[int, Field(ge=0)]
    scratch_bytes: Annotated[int, Field(ge=0)] | None = None
    skeleton: Annotated[str, Field(pattern=r"^[a-z]+(_[0-9]+)?\.onnx$")] | None = None
    skeleton_sha256: Digest | None = None
    weights: tuple[Weight, ...] = ()


class PlanManifest(Frozen):
    """`plans.json`.

    Attributes:
        artifact: the sha256 of the artifact's manifest.
        capabilities: compute capabilities that the plans run on, 86 for 8.6; with `compatibility` "ampere-plus" the
            one that they were built on.
        batch, size: as on the command line; None: left out.
        gpu: the GPU that TensorRT built on; "" for plans that were built for a capability alone.
    """

    format: Annotated[int, Field(ge=1, le=PLAN_FORMAT)] = PLAN_FORMAT
    name: str
    target: Target
    version: Version
    artifact: Digest
    precision: Precision
    capabilities: Annotated[tuple[Capability, ...], Field(min_length=1)]
    gpu: Annotated[str, Field(max_length=200)] = ""
    compatibility: Compatibility = "none"
    version_compatible: bool = False
    batch: Annotated[str, Field(pattern=r"^[0-9]+:[0-9]+$")] | None = None
    size: Annotated[str, Field(pattern=r"^[0-9]+([,:][0-9]+)*$")] | None = None
    programs: dict[ProgramName, PlanFile]

    def command(self) -> str:
        """What builds these plans again."""
        words = ["volcast build ARTIFACT --target", self.target, "--precision", self.precision.value]
        if self.target == "tensorrt-rtx":
            words += [f"--sm {one}" for one in self.capabilities]
        words += [] if self.batch is None else ["--batch", self.batch]
        words += [] if self.size is None else ["--size", self.size]
        if self.compatibility != "none":
            words += ["--compatibility", self.compatibility]
        words += ["--version-compatible"] if self.version_compatible else []
        words += ["--strip"] if any(plan.skeleton for plan in self.programs.values()) else []
        return f"`{' '.join(words)} --force`"


class Host(Frozen):
    """What is to run the plans: a library's version and a GPU's name and compute capability."""

    target: Target
    version: Version
    gpu: str
    capability: Capability


def read_plans(folder: Path) -> PlanManifest:
    """`plans.json` in `folder`. Raises ValueError for none, a damaged or newer one, unknown keys."""
    path = folder / PLANS
    build = "`volcast build ARTIFACT --target tensorrt` or `tensorrt-rtx`"
    if not path.is_file():
        raise ValueError(f"[plans] {folder} holds no {PLANS}; run {build}")
    try:
        return PlanManifest.model_validate(json.loads(path.read_bytes()))
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        reason = " ".join(f"{where} {first['msg']}".split())
        raise ValueError(f"[plans] {path}: {reason}; run {build} again with --force") from error


def check_plans(folder: Path, plans: PlanManifest, host: Host, artifact: str) -> None:
    """Raise ValueError, with the command that rebuilds them, for plans that `host` must not run.

    `artifact` is the sha256 of the manifest of the artifact that they are to serve.
    """
    again = f"run {plans.command()}"
    if plans.artifact != artifact:
        raise ValueError(f"[plans] {folder} was built from another export of {plans.name}; {again}")
    if plans.target != host.target:
        raise ValueError(f"[plans] {folder} is for {plans.target}, not {host.target}; {again}")
    if not _version_fits(plans, host.version):
        raise ValueError(
            f"[plans] {folder} was built by {plans.target} {plans.version}, this is {host.version}; {again}"
        )
    built = ", ".join(f"{one // 10}.{one % 10}" for one in plans.capabilities)
    here = f"this is {host.gpu} ({host.capability // 10}.{host.capability % 10})"
    if plans.compatibility == "ampere-plus":
        if host.capability < 80:
            raise ValueError(f"[plans] {folder} was built for 8.0 and newer, {here}; {again} here")
    elif host.capability not in plans.capabilities:
        sm = f" with --sm {host.capability}" if plans.target == "tensorrt-rtx" else " here"
        raise ValueError(f"[plans] {folder} was built for compute capability {built}, {here}; {again}{sm}")
    elif plans.gpu and plans.gpu != host.gpu and plans.compatibility == "none":
        raise ValueError(f"[plans] {folder} was built on {plans.gpu}, {here}; {again} here")


def find_plan(folder: Path, plans: PlanManifest, name: ProgramName) -> PlanFile:
    """The description of one plan; ValueError where there is none."""
    if name not in plans.programs:
        raise ValueError(f"[plans] {folder} holds no {name}; run {plans.command()}")
    return plans.programs[name]


def read_plan(folder: Path, plans: PlanManifest, name: ProgramName, source: str) -> bytes:
    """The bytes of one plan, whole and of the ONNX file whose sha256 is `source`; ValueError for others."""
    again = f"run {plans.command()}"
    plan = find_plan(folder, plans, name)
    if plan.source != source:
        raise ValueError(f"[plans] {folder / plan.file} was built from another {name}.onnx; {again}")
    return _checked(folder / plan.file, plan.sha256, plan.bytes, again)


def read_skeleton(folder: Path, plans: PlanManifest, name: ProgramName) -> bytes:
    """The ONNX program, without weights, of a stripped plan; ValueError for an altered or missing one."""
    plan = plans.programs[name]
    assert plan.skeleton is not None and plan.skeleton_sha256 is not None
    return _checked(folder / plan.skeleton, plan.skeleton_sha256, None, f"run {plans.command()}")


def check_sizes(folder: Path, plans: PlanManifest, name: ProgramName, sizes: Mapping[str, int]) -> None:
    """Raise ValueError where the plan's profile does not hold these sizes, with the build that would."""
    for axis, size in sizes.items():
        held = plans.programs[name].ranges.get(axis)
        if held is not None and not held.minimum <= size <= held.maximum:
            option = "--batch" if axis == "batch" else "--size"
            remedy = f"build with another {option}: {plans.command()}"
            if axis == "steps":
                remedy = "give fewer steps, or call it for a part of them"
            raise ValueError(
                f"[{name}] {axis}={size}: the plan in {folder} takes {held.minimum}..{held.maximum}; {remedy}"
            )


def inputs_ranges(
    program: ProgramSpec, ranges: Mapping[str, Range]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """By input: its smallest, tuned and largest shape."""

    def shape(sizes: tuple[int | str, ...], which: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else getattr(ranges[size], which) for size in sizes)

    return {
        tensor.name: tuple(shape(tensor.shape, which) for which in ("minimum", "optimum", "maximum"))
        for tensor in program.inputs
    }


def planned_programs(spec: ArtifactSpec) -> dict[ProgramName, ProgramSpec]:
    """What becomes a plan: the artifact's programs, and the segments of its decoder."""
    programs: dict[ProgramName, ProgramSpec] = {
        name: spec.programs[name] for name in _ORDER if name in spec.programs
    }
    for segment in () if spec.slabs is None else spec.slabs.segments:
        programs[Path(segment.program.file).stem] = segment.program
    return programs


def source_digest(spec: ArtifactSpec, name: ProgramName) -> str:
    """The sha256 of a program's ONNX file, which `read_artifact` has checked."""
    return spec.files[planned_programs(spec)[name].file]


def _version_fits(plans: PlanManifest, version: str) -> bool:
    if plans.version == version:
        return True
    built, here = (tuple(map(int, text.split("."))) for text in (plans.version, version))
    return plans.version_compatible and built[0] == here[0] and built <= here


def _checked(path: Path, digest: str, size: int | None, again: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"[plans] {path} is missing: {error.strerror}; {again}") from error
    if size is not None and len(content) != size:
        raise ValueError(f"[plans] {path} has {len(content)} of {size} bytes: it was cut short; {again}")
    if sha256(content).hexdigest() != digest:
        raise ValueError(f"[plans] {path} was altered; {again}")
    return content
