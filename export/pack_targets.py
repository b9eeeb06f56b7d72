"""What a pack holds for each target: the packages that its engine needs, and the engines that must have been built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from volcast.runtime.artifact import MANIFEST
from volcast.runtime.atomic import sha256
from volcast.runtime.cubins import read_cubins
from volcast.runtime.pack import PackTarget
from volcast.runtime.plans import PLANS, Target, read_plan, read_plans, source_digest
from volcast.runtime.spec import ArtifactSpec

Engines = Callable[[Path, ArtifactSpec], list[Path]]
"""The folders under ARTIFACT/engines that a target needs, checked; ValueError for one that is missing or damaged."""


@final
@dataclass(frozen=True, kw_only=True)
class Packed:
    """One target.

    Attributes:
        engine: what `volcast sample --engine` calls it; "" for none.
        packages: what the engine needs besides volcast, by the machine that has it from PyPI; a machine that is not
            named cannot be packed for.
        engines: which folders go along.
    """

    engine: str
    packages: Mapping[str, tuple[str, ...]]
    engines: Engines


def _none(artifact: Path, spec: ArtifactSpec) -> list[Path]:
    return []


def _plans(target: Target) -> Engines:
    def find(artifact: Path, spec: ArtifactSpec) -> list[Path]:
        found = [path.parent for path in sorted((artifact / "engines").glob(f"*/{PLANS}"))]
        folders = [folder for folder in found if read_plans(folder).target == target]
        if not folders:
            raise _missing(artifact, target, "")
        for folder in folders:
            plans = read_plans(folder)
            _check_origin(folder, plans.artifact, artifact, target)
            for name in plans.programs:
                read_plan(folder, plans, name, source_digest(spec, name))
        return folders

    return find


def _cuda(artifact: Path, spec: ArtifactSpec) -> list[Path]:
    from volcast.runtime.device.program import read_programs

    folder = artifact / "engines" / "cuda"
    if not folder.is_dir():
        raise _missing(artifact, "cuda", "")
    read_programs(folder, sha256(artifact / MANIFEST))
    return [folder]


def _cubins(artifact: Path, spec: ArtifactSpec) -> list[Path]:
    folder = artifact / "engines" / "cubin"
    if not folder.is_dir():
        raise _missing(artifact, "cubin", " --sm 87")
    _check_origin(folder, read_cubins(folder).artifact, artifact, "cubin")
    return [folder]


def _missing(artifact: Path, target: str, options: str) -> ValueError:
    return ValueError(
        f"[pack] {artifact} has nothing built for {target}; run `volcast build {artifact} --target {target}{options}`"
    )


def _check_origin(folder: Path, found: str, artifact: Path, target: str) -> None:
    if found != sha256(artifact / MANIFEST):
        raise ValueError(
            f"[pack] {folder} was built from another export; run `volcast build {artifact} --target {target} --force`"
        )


def _everywhere(*packages: str) -> dict[str, tuple[str, ...]]:
    return {"x86_64": packages, "aarch64": packages}


TARGETS: Mapping[PackTarget, Packed] = {
    "cpu": Packed(engine="onnxruntime", packages=_everywhere(), engines=_none),
    "openvino": Packed(engine="openvino", packages=_everywhere("openvino"), engines=_none),
    # A Jetson has TensorRT from JetPack.
    "tensorrt": Packed(
        engine="tensorrt", packages={"x86_64": ("tensorrt",), "aarch64": ()}, engines=_plans("tensorrt")
    ),
    "tensorrt-rtx": Packed(
        engine="tensorrt-rtx",
        packages={"x86_64": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs")},
        engines=_plans("tensorrt-rtx"),
    ),
    "cuda": Packed(engine="cuda", packages=_everywhere("torch", "triton", "safetensors"), engines=_cuda),
    "cubin": Packed(engine="", packages=_everywhere(), engines=_cubins),
}
