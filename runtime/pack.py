"""The manifest of a pack: what `volcast pack` writes for a device, and what is checked there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from .atomic import sha256
from .frozen import Frozen

PACK = "pack.json"
PACK_FORMAT = 1
ARTIFACT = "artifact"
WHEELS = "wheels"
REQUIREMENTS = "requirements.txt"
PackTarget = Literal["cpu", "openvino", "tensorrt", "tensorrt-rtx", "cuda", "cubin"]


class PackManifest(Frozen):
    """`pack.json`.

    Attributes:
        platform: the wheel's platform tag, as manylinux_2_34_aarch64: the oldest glibc and the machine.
        python: major and minor version, which the wheel's compiled core is for.
        versions: of volcast and of every package in requirements.txt.
        files: the sha256 of every other file, by its path inside the pack.
    """

    format: Annotated[int, Field(ge=1, le=PACK_FORMAT)] = PACK_FORMAT
    name: str
    target: PackTarget
    platform: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    python: Annotated[str, Field(pattern=r"^3\.[0-9]+$")]
    versions: dict[str, str]
    files: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-+]*(/[A-Za-z0-9_][A-Za-z0-9_.\-+]*)*$")],
        Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")],
    ]

    def as_text(self) -> str:
        """Its contents in a line."""
        return (
            f"pack of {self.name}: target {self.target}, volcast {self.versions['volcast']} for Python "
            f"{self.python} on {self.platform}, {len(self.files)} files"
        )


def read_pack(folder: str | os.PathLike[str]) -> PackManifest:
    """The manifest in `folder`, after checking every file against its sha256.

    Raises ValueError: no pack there, a damaged or newer manifest, a missing or altered file; with the remedy.
    """
    folder, remedy = Path(folder), "copy the pack again, or make it again with `volcast pack`"
    path = folder / PACK
    if not path.is_file():
        raise ValueError(f"[pack] {folder} holds no {PACK}; give a folder that `volcast pack` wrote")
    try:
        manifest = PackManifest.model_validate(json.loads(path.read_bytes()))
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        reason = " ".join(f"{'.'.join(map(str, first['loc']))} {first['msg']}".split())
        raise ValueError(f"[pack] {path}: {reason}; {remedy}") from error
    for name, digest in manifest.files.items():
        file = folder / name
        if not file.is_file() or sha256(file) != digest:
            raise ValueError(f"[pack] {file} is missing or was altered; {remedy}")
    return manifest
