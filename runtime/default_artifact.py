"""The bundled hippocampus model, exported once into the user's cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import volcast

from .artifact import MANIFEST
from .atomic import sha256

NAME = "hippocampus"
BUNDLE = Path(volcast.__file__).parent / "models" / NAME
SOURCES = tuple(Path(volcast.__file__).parent / folder for folder in ("kernels", "runtime", "export"))
"""What an export may import of volcast."""


def default_artifact(controlled: bool = False) -> Path:
    """The folder of the bundled model's artifact; exported first (some minutes) if the cache lacks it.

    `controlled`: with the ControlNet that takes a label map.

    It lives in `$XDG_CACHE_HOME/volcast` (or `~/.cache/volcast`) under a name made of volcast's version, the bundle's
    bytes and the export's sources, so that neither an upgrade nor another bundle meets an old artifact. The export runs as
    `python -m volcast export` in a process of its own: this one never imports torch.

    Raises:
        ValueError: torch or monai is missing, or the export failed.
    """
    folder = cache_folder() / f"{NAME}{'-controlnet' if controlled else ''}-{_key()}"
    if (folder / MANIFEST).is_file():
        return folder
    missing = [name for name in ("torch", "monai", "onnx") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"[load] the bundled model must be exported once, which needs {' and '.join(missing)}: "
            "pip install 'volcast[export]', or give an artifact"
        )
    print(f"volcast: exporting the bundled {NAME} model to {folder}, once", file=sys.stderr)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"[load] cannot make {folder.parent}: {error.strerror}; set XDG_CACHE_HOME"
        ) from error
    command = [sys.executable, "-m", "volcast", "export", str(BUNDLE), "-o", str(folder)]
    command += ["--controlnet", "controlnet_def"] if controlled else []
    # What the child prints is progress, and stdout may carry --json. By number: a notebook's sys.stderr has no descriptor.
    code = subprocess.run(command, stdout=2, check=False).returncode
    # Another process may have exported the same model meanwhile: what counts is that it is there.
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"[load] exporting the bundled model failed (exit code {code}); see the lines above")
    return folder


def cache_folder() -> Path:
    """Where volcast keeps what it can make again: `$XDG_CACHE_HOME/volcast`, or `~/.cache/volcast`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "volcast"


def _key() -> str:
    if not BUNDLE.is_dir():
        raise ValueError(f"[load] {BUNDLE} is missing; install volcast again, or give an artifact")
    digest = hashlib.sha256(volcast.__version__.encode())
    files = [(BUNDLE, path) for path in sorted(BUNDLE.rglob("*"))]
    # All of them: a list of those that matter would be forgotten, and an export takes a minute.
    files += [(folder, path) for folder in SOURCES for path in sorted(folder.rglob("*.py"))]
    for folder, path in files:
        if path.is_file():
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()[:16]
