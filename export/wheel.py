"""A wheel of the volcast that runs here, for this machine or with a core compiled for another.

Made from the importable package, whether it was installed or is a checkout: what was tested is what is packed. The
bundled model's weights (50 MB) stay out: a device gets its artifact beside the wheel.
"""

from __future__ import annotations

import base64
import hashlib
import platform
import re
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import volcast

_PACKAGE = Path(volcast.__file__).parent
_DATA = (".py", ".pyi", ".json", ".typed")
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The same files give the same wheel."""


def native_core() -> Path:
    """The compiled core of this machine."""
    (core,) = _PACKAGE.glob(f"_core.{sys.implementation.cache_tag}-*.so")
    return core


def platform_tag(core: Path, machine: str = platform.machine()) -> str:
    """The manylinux tag of a core: pip refuses the wheel where the C library is older than what the core names."""
    versions = [int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)(?:\.\d+)?(?=\0)", core.read_bytes())]
    if not versions:
        raise ValueError(f"[pack] {core.name} names no version of glibc: only Linux with glibc is supported")
    return f"manylinux_2_{max(17, *versions)}_{machine}"


def write_wheel(folder: Path, core: Path, tag: str) -> Path:
    """Write volcast's wheel, with `core` as its compiled module and `tag` as its platform, into `folder`.

    Raises ValueError where volcast is importable but not installed: then nothing tells what it needs.
    """
    try:
        installed = distribution("volcast")
    except PackageNotFoundError as error:
        raise ValueError("[pack] volcast is not installed here; pip install -e . in its checkout") from error
    metadata, entry_points = installed.read_text("METADATA"), installed.read_text("entry_points.txt")
    assert metadata is not None and entry_points is not None
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    info = f"volcast-{installed.version}.dist-info"
    wheel = f"Wheel-Version: 1.0\nGenerator: volcast\nRoot-Is-Purelib: false\nTag: {python}-{python}-{tag}\n"
    contents = {f"volcast/{name}": path.read_bytes() for name, path in _modules()}
    contents |= {
        f"volcast/{core.name}": core.read_bytes(),
        f"{info}/METADATA": metadata.encode(),
        f"{info}/entry_points.txt": entry_points.encode(),
        f"{info}/WHEEL": wheel.encode(),
    }
    record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in contents.items())
    contents[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = folder / f"volcast-{installed.version}-{python}-{python}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return path


def _modules() -> Iterator[tuple[str, Path]]:
    """(path inside the package, file) of every module and its data, sorted."""
    folders = [_PACKAGE, *(path for path in sorted(_PACKAGE.iterdir()) if (path / "__init__.py").is_file())]
    for folder in folders:
        found = folder.iterdir() if folder == _PACKAGE else folder.rglob("*")
        for path in sorted(found):
            if path.is_file() and path.suffix in _DATA:
                yield path.relative_to(_PACKAGE).as_posix(), path


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
