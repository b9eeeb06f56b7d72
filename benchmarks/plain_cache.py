"""Where plain ONNX exports are kept between runs: an export takes a minute."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

OPSET = 21


def plain_folder(weights: Mapping[str, str]) -> Path:
    """The folder in the user's cache for the networks with these weights (sha256 by role), this torch, this MONAI."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    cache = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    facts = [f"{role}={digest}" for role, digest in sorted(weights.items())]
    facts += [version("torch"), version("monai"), str(OPSET)]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return cache / "volcast" / f"plain-onnx-{key[:16]}"
