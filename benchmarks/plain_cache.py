"""Where plain ONNX exports are kept between runs: an export takes a minute."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from volcast.runtime.default_artifact import cache_folder

OPSET = 21


def plain_folder(weights: Mapping[str, str]) -> Path:
    """The folder in the user's cache for the networks with these weights (sha256 by role), this torch, this MONAI."""
    facts = [f"{role}={digest}" for role, digest in sorted(weights.items())]
    facts += [version("torch"), version("monai"), str(OPSET)]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return cache_folder() / f"plain-onnx-{key[:16]}"
