"""Reading an artifact's manifest: everything is checked before any engine sees a file."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from .atomic import sha256
from .external_data import external_data
from .generator_spec import GENERATOR_FORMAT, GeneratorSpec
from .spec import FORMAT, ArtifactSpec, Manifest
from .token_spec import TOKEN_FORMAT, TokenSpec

MANIFEST = "manifest.json"
KINDS: dict[int, type[ArtifactSpec | TokenSpec | GeneratorSpec]] = {
    FORMAT: ArtifactSpec, TOKEN_FORMAT: TokenSpec, GENERATOR_FORMAT: GeneratorSpec
}  # fmt: skip
"""What a manifest of each format describes."""
_MAX_BYTES = 4 * 2**20
_MAX_DEPTH = 32
_REMEDY = "export the model again with `volcast export`"


def parse_manifest(text: bytes) -> Manifest:
    """The manifest in `text` (JSON, UTF-8, at most 4 MiB, at most 32 levels deep).

    Raises:
        ValueError: one line with the field, the value and the remedy.
    """
    if len(text) > _MAX_BYTES:
        raise ValueError(
            f"[artifact] {MANIFEST} has {len(text)} bytes: at most {_MAX_BYTES} are read; {_REMEDY}"
        )
    _check_depth(text)
    try:
        data = json.loads(text, object_pairs_hook=_object_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"[artifact] {MANIFEST} is not valid JSON ({_short(error)}); {_REMEDY}") from error
    if not _is_text(data):
        raise ValueError(f"[artifact] {MANIFEST} holds half a surrogate pair, which is no text; {_REMEDY}")
    version = data.get("format") if isinstance(data, dict) else None
    if isinstance(version, int) and version > max(KINDS):
        raise ValueError(
            f"[artifact] format {_short(version)} is newer than {max(KINDS)}, the newest this volcast reads; upgrade volcast"
        )
    kind = KINDS.get(version, ArtifactSpec) if isinstance(version, int) else ArtifactSpec
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ValueError(_one_line(error)) from error


def read_artifact(folder: str | os.PathLike[str]) -> ArtifactSpec:
    """The manifest of a diffusion model's artifact: `read_manifest`, which says what is checked.

    Raises ValueError besides: the artifact is another kind of model's, which the caller cannot use.
    """
    spec = read_manifest(folder)
    if isinstance(spec, ArtifactSpec):
        return spec
    what = (
        "samples tokens with a transformer: sample, serve, generate, likelihood, heal, verify and info take it"
        if isinstance(spec, TokenSpec)
        else "makes an image in one pass: sample, serve, generate, verify and info take it"
    )
    raise ValueError(f"[artifact] {spec.name} {what}, give a diffusion model here")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of the artifact in `folder`, after checking every file that it lists against its sha256.

    Raises:
        ValueError: no artifact there, a bad manifest, a missing or altered file, a link that leaves the folder, an
            ONNX file that names external data which the manifest does not list.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"[artifact] {folder} is not a folder; give one written by `volcast export`")
    if not manifest.is_file():
        raise ValueError(
            f"[artifact] {folder} holds no {MANIFEST}; give a folder written by `volcast export`"
        )
    try:
        root = folder.resolve()
        _inside(root, manifest)
        with open(manifest, "rb") as stream:
            spec = parse_manifest(stream.read(_MAX_BYTES + 1))
        for name, digest in spec.files.items():
            path = folder / name
            _inside(root, path)
            if not path.is_file():
                raise ValueError(
                    f"[artifact] {name} is missing from {folder}; copy the whole folder or {_REMEDY}"
                )
            found = sha256(path)
            if found != digest:
                raise ValueError(
                    f"[artifact] {name} was altered or cut short: sha256 {found[:12]}, manifest {digest[:12]}; {_REMEDY}"
                )
        for program in spec.every_program():
            _check_external_data(spec, program.file, folder / program.file)
    except OSError as error:
        raise ValueError(f"[artifact] cannot read {error.filename or folder}: {error.strerror}") from error
    return spec


def digests(folder: str | os.PathLike[str]) -> dict[str, str]:
    """The sha256 of every file under `folder` but the manifest, by its path with forward slashes, sorted."""
    folder = Path(folder)
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: sha256(folder / name) for name in sorted(names) if name != MANIFEST}


def _is_text(data: object) -> bool:
    """JSON may escape what UTF-8 cannot hold."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _inside(root: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(root):
        raise ValueError(
            f"[artifact] {path.name} is a link that leaves the artifact's folder; copy the real file in"
        )


def _check_external_data(spec: Manifest, name: str, path: Path) -> None:
    for location in external_data(path):
        if (PurePosixPath(name).parent / location).as_posix() not in spec.files:
            raise ValueError(
                f"[artifact] {name} names external data {_short(repr(location))}, which the manifest lacks; {_REMEDY}"
            )


def _check_depth(text: bytes) -> None:
    depth = deepest = 0
    quoted = escaped = False
    for byte in text:
        if quoted:
            quoted = escaped or byte != 0x22
            escaped = byte == 0x5C and not escaped
        elif byte == 0x22:
            quoted = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    if deepest > _MAX_DEPTH:
        raise ValueError(
            f"[artifact] {MANIFEST} is nested {deepest} levels deep: at most {_MAX_DEPTH}; {_REMEDY}"
        )


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else text[:117] + "..."


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "manifest"
    value = "" if isinstance(first["input"], dict) else f"={_short(repr(first['input']))}"
    more = f" (and {error.error_count() - 1} more faults)" if error.error_count() > 1 else ""
    return f"[artifact] {_short(field)}{value}: {_short(first['msg'])}{more}; {_REMEDY}"
