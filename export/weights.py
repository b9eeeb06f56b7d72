"""Weight files without pickle: `.safetensors`, or `.pt` through torch's weights-only loader."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from volcast.export.bundle_config import one_line, read_data

WRAPPERS = ("state_dict", "model_state_dict", "model", "unet_state_dict", "autoencoder_state_dict", "network")
"""Names under which training scripts store a network's weights inside a checkpoint."""
_REMEDY = "fetch it again, or name another file with --weights"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The mapping in a weight file, tensors on the CPU, nothing of it run.

    ValueError with the file's name if it is missing, truncated, altered, or needs pickle's code to load.
    """
    if not path.is_file():
        raise ValueError(f"[weights] {path}: no such file; {_REMEDY}")
    try:
        if path.suffix == ".safetensors":
            data: Any = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old storages warn on load; what they hold is checked below
                data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (
            "holds objects besides tensors" if "unsupported" in str(error).lower() else "is not a weight file"
        )
        raise ValueError(
            f"[weights] {path}: {reason}; {_REMEDY}, or save its state dict as safetensors where it was made"
        ) from None
    # A damaged archive fails in the zip reader, the unpickler or torch, each with errors of its own.
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        EOFError,
        MemoryError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        reason = one_line(error, 120)
        raise ValueError(f"[weights] {path}: truncated or not a weight file ({reason}); {_REMEDY}") from None
    if not isinstance(data, Mapping) or not data:
        raise ValueError(f"[weights] {path}: holds a {type(data).__name__}, not a state dict; {_REMEDY}")
    return {str(key): value for key, value in data.items()}


def entry(checkpoint: Mapping[str, Any], keys: Sequence[str], path: Path, remedy: str) -> Any:
    """`checkpoint[keys[0]][keys[1]]...`; ValueError names the first key that is not there."""
    value: Any = checkpoint
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            there = (
                ", ".join(map(str, list(value)[:3])) if isinstance(value, Mapping) else type(value).__name__
            )
            raise ValueError(f"[weights] {path}: no entry {key!r} (there: {there}); {remedy}")
        value = value[key]
    return value


def state_dict(
    checkpoint: Mapping[str, Any], keys: Sequence[str], path: Path, role: str
) -> dict[str, torch.Tensor]:
    """The tensors under `keys`; without keys, the whole file or its one entry named in `WRAPPERS`.

    Entries beside the tensors (epoch, optimizer) are an error unless the keys say what to take. The prefix
    `module.` of distributed training is taken off.
    """
    remedy = f"name the entry with --set {role}_weights_key=NAME"
    found = entry(checkpoint, keys, path, remedy)
    if not keys and not all(isinstance(value, torch.Tensor) for value in found.values()):
        names = [name for name in WRAPPERS if isinstance(found.get(name), Mapping)]
        if len(names) != 1:
            raise ValueError(f"[weights] {path}: its entries are {', '.join(list(found)[:8])}; {remedy}")
        found = found[names[0]]
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"[weights] {path}: the entry {'.'.join(keys)!r} is no state dict; {remedy}")
    for key, value in found.items():
        # Sparse, quantised and meta tensors have no plain values to convert.
        if (
            not isinstance(value, torch.Tensor)
            or value.layout != torch.strided
            or value.is_meta
            or value.is_quantized
        ):
            raise ValueError(
                f"[weights] {path}: {key!r} is no plain tensor ({type(value).__name__}); {remedy}"
            )
    prefix = "module." if all(str(key).startswith("module.") for key in found) else ""
    return {str(key).removeprefix(prefix): value.detach() for key, value in found.items()}


def scalar(value: Any, path: Path, keys: Sequence[str]) -> float:
    """A number of a checkpoint (`scale_factor`), stored as a number or as a tensor of one element."""
    if (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and value.numel() == 1
    ):
        return float(value.item())
    if isinstance(value, int | float):
        return float(value)
    raise ValueError(f"[weights] {path}: {'.'.join(keys)} is no number; give it with --set scale_factor=...")


def digest(path: Path, kind: str = "sha256") -> str:
    """Hex digest of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, kind).hexdigest()
    except OSError as error:
        raise ValueError(f"[weights] {path}: {error.strerror}; {_REMEDY}") from None


class LargeFiles:
    """`large_files.yml` of a bundle: which weight files it has and their hashes (the model zoo's format)."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._entries: dict[str, dict[str, Any]] = {}
        file = next(
            (root / name for name in ("large_files.yml", "large_files.yaml") if (root / name).is_file()), None
        )
        if file is None:
            return
        entries = read_data(file)[0].get("large_files")
        if not isinstance(entries, list) or not all(
            isinstance(e, dict) and isinstance(e.get("path"), str) for e in entries
        ):
            raise ValueError(
                f"[weights] {file}: large_files is not a list of entries with a path; correct the file"
            )
        self._entries = {os.path.normpath(e["path"]): e for e in entries}

    def check(self, path: Path) -> None:
        """ValueError if the file is listed and missing, or listed with a hash that it does not have."""
        found = self._entries.get(os.path.relpath(path, self._root))
        if found is None:
            return
        if not path.is_file():
            url = f"download {one_line(found['url'])}" if found.get("url") else "copy it there"
            raise ValueError(f"[weights] {path}: no such file; {url} (large_files.yml), or use --weights")
        wanted, kind = found.get("hash_val"), found.get("hash_type", "md5")
        if not wanted:
            return
        if kind not in {"md5", "sha1", "sha256"}:
            raise ValueError(f"[weights] large_files.yml: hash_type={kind!r}: need md5, sha1 or sha256")
        if digest(path, kind) != str(wanted).lower():
            raise ValueError(
                f"[weights] {path}: its {kind} is not {wanted} (large_files.yml): altered; {_REMEDY}"
            )
