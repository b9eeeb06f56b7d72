"""Where tritonserver is on this machine, and what it needs in its environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import final

INSTALL = "pip install --no-deps nvidia-pytriton==0.7.0"
"""Without its dependencies: it asks for numpy below 2, which only its Python part needs; volcast uses the binary."""


@final
@dataclass(frozen=True, kw_only=True)
class Installation:
    """A tritonserver. `environment`: variables that it has to be started with, besides those of this process."""

    binary: Path
    backends: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def find_installation(scratch: Path, given: Path | None = None) -> Installation:
    """The server at `given`, else in /opt/tritonserver (NVIDIA's container), else in the wheel nvidia-pytriton.

    `scratch`: a folder for the wheel's backend, which must lie beside the stub for this Python.

    Raises ValueError: there is none, or its Python stub does not start; with the remedy.
    """
    if given is not None:
        binary = given / "bin" / "tritonserver" if given.is_dir() else given
        if not os.access(binary, os.X_OK):
            raise ValueError(
                f"[serve] {given}: no tritonserver there; give its file or its folder, or {INSTALL}"
            )
        return Installation(binary=binary, backends=binary.parent.parent / "backends")
    opt = Path("/opt/tritonserver")
    if (opt / "bin" / "tritonserver").is_file():
        return Installation(binary=opt / "bin" / "tritonserver", backends=opt / "backends")
    # Not imported: its Python part needs what we do not install.
    wheel = find_spec("pytriton")
    places = (wheel.submodule_search_locations if wheel is not None else None) or ()
    for place in places:
        if (Path(place) / "tritonserver" / "bin" / "tritonserver").is_file():
            return _wheel(Path(place), scratch)
    raise ValueError(
        f"[serve] no tritonserver found: {INSTALL}, or give --tritonserver, or use NVIDIA's container"
    )


def _wheel(package: Path, scratch: Path) -> Installation:
    home, version = package / "tritonserver", f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise ValueError(
            f"[serve] the wheel's tritonserver has no stub for Python {version}; use 3.11, 3.12 or 3.13"
        )
    backends = scratch / "backends"
    shutil.copytree(home / "backends" / "python", backends / "python")
    shutil.copy2(stub, backends / "python" / stub.name)
    # The stub is linked to libpython, which may lie where only this Python knows.
    libraries = [str(package.parent / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    libraries += [path for path in (os.environ.get("LD_LIBRARY_PATH"),) if path]
    environment = {
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', '')}",
    }
    _try(backends / "python" / stub.name, environment, version)
    return Installation(binary=home / "bin" / "tritonserver", backends=backends, environment=environment)


def _try(stub: Path, environment: Mapping[str, str], version: str) -> None:
    done = subprocess.run(
        [stub],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 127:  # the loader's: a library is missing; otherwise the stub asks for arguments
        reason = " ".join(done.stderr.split())
        raise ValueError(
            f"[serve] tritonserver's Python does not start ({reason}): apt-get install libpython{version}"
        )
