"""`volcast pack`: one folder or tar with what a device needs to sample from an artifact, and nothing else."""

from __future__ import annotations

import platform
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from hashlib import file_digest
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from typing import cast

from volcast.runtime.artifact import MANIFEST, read_artifact
from volcast.runtime.atomic import atomic_file, atomic_folder, sha256
from volcast.runtime.pack import ARTIFACT, PACK, REQUIREMENTS, WHEELS, PackManifest, PackTarget, read_pack
from volcast.runtime.pipeline import load

from .cross_core import cross_core
from .pack_targets import TARGETS
from .pins import pinned
from .wheel import native_core, platform_tag, write_wheel


def pack(
    artifact: Path,
    output: Path,
    target: PackTarget,
    *,
    machine: str | None = None,
    replace: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> PackManifest:
    """Write the pack to the folder `output`, or to one tar where its name ends in .tar, and read it back.

    The artifact goes along whole: what cannot run from engines, and their rebuilding, need its programs. The wheel is
    volcast as it runs here, for this Python's version; with `machine` ("aarch64") its core is compiled for that.

    Raises ValueError, before anything is written: an artifact or engines that are missing, damaged or another's, a
    target that `machine` has no packages for, an output that exists (and not `replace`).
    """
    here = platform.machine()
    machine = machine or here
    chosen = TARGETS[target]
    if machine not in chosen.packages:
        known = ", ".join(chosen.packages)
        raise ValueError(
            f"[pack] --platform {machine}: {target} has packages for {known} alone; choose another target"
        )
    _check_output(output, replace)
    progress("check")
    spec = read_artifact(artifact)
    engines = chosen.engines(artifact, spec)
    pins = pinned(chosen.packages[machine], machine)
    with tempfile.TemporaryDirectory(prefix="volcast-pack-") as scratch:
        progress("core")
        core = native_core() if machine == here else cross_core(Path(scratch), machine)
        tag = platform_tag(core, machine)
        if output.suffix != ".tar":
            with atomic_folder(output, replace=replace) as folder:
                return _fill(folder, artifact, engines, core, tag, target, pins, progress)
        with tempfile.TemporaryDirectory(prefix=".tmp-pack-", dir=output.parent) as place:
            folder = Path(place) / output.stem
            folder.mkdir()
            manifest = _fill(folder, artifact, engines, core, tag, target, pins, progress)
            progress("tar")
            with atomic_file(output) as temporary:
                _write_tar(folder, temporary)
                _check_tar(temporary, manifest)
    return manifest


def _check_output(output: Path, replace: bool) -> None:
    if not output.parent.is_dir():
        raise ValueError(f"[pack] {output.parent} is not a folder; create it first")
    if not output.exists():
        return
    if not replace:
        raise ValueError(f"[pack] {output} exists: remove it, choose another name, or pass --force")
    if output.is_dir() and not (output / PACK).is_file() and any(output.iterdir()):
        raise ValueError(
            f"[pack] {output} holds no {PACK}, something else: it is not replaced; choose another name"
        )


def _fill(
    folder: Path,
    artifact: Path,
    engines: list[Path],
    core: Path,
    tag: str,
    target: PackTarget,
    pins: dict[str, str],
    progress: Callable[[str], None],
) -> PackManifest:
    progress("copy")
    spec = read_artifact(artifact)
    inside = folder / ARTIFACT
    for name in (MANIFEST, *spec.files):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact / name, inside / name)
    for built in engines:
        shutil.copytree(built, inside / built.relative_to(artifact), copy_function=shutil.copyfile)
    progress("wheel")
    (folder / WHEELS).mkdir()
    write_wheel(folder / WHEELS, core, tag)
    lines = [
        f"# pip install -r {REQUIREMENTS} {WHEELS}/*.whl",
        *(f"{name}=={pin}" for name, pin in pins.items()),
    ]
    (folder / REQUIREMENTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    progress("digests")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    manifest = PackManifest(
        name=spec.name, target=target, platform=tag, python=f"{sys.version_info.major}.{sys.version_info.minor}",
        versions={"volcast": version("volcast"), **pins}, files={name: sha256(folder / name) for name in names},
    )  # fmt: skip
    (folder / PACK).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    progress("read back")
    if read_pack(folder) != manifest:
        raise ValueError(
            f"[pack] {folder} does not read back as it was written; check the disk and try again"
        )
    load(inside, "onnxruntime")
    TARGETS[target].engines(inside, spec)
    return manifest


def _write_tar(folder: Path, path: Path) -> None:
    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            name = f"{folder.name}/{file.relative_to(folder).as_posix()}"
            archive.add(file, name, recursive=False, filter=plain)


def _check_tar(path: Path, manifest: PackManifest) -> None:
    with tarfile.open(path) as archive:
        found = {
            member.name.partition("/")[2]: file_digest(cast(BufferedReader, stream), "sha256").hexdigest()
            for member in archive
            if member.isfile() and (stream := archive.extractfile(member)) is not None
        }
    found.pop(PACK, None)
    if found != manifest.files:
        raise ValueError(
            f"[pack] {path.name} does not read back as it was written; check the disk and try again"
        )
