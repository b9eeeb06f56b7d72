"""Reading a dataset: its description, its manifest, and whether its files are what the manifest says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

from pydantic import ValidationError

from .atomic import sha256
from .frozen import Frozen

DESCRIPTION = "dataset.json"
MANIFEST = "manifest.jsonl"
SHARD = 1000
"""Volumes a shard: a folder that every file system and viewer lists quickly."""


@final
class Entry(Frozen):
    """One line of the manifest.

    Attributes:
        index: of the volume in the dataset, from 0.
        seed, sample: `Model.sample_many(seed=seed)`'s volume number `sample`, made with `conditions`.
        conditions: numbers, lists; of large arrays shape and sha256.
        file: below the dataset's folder, with forward slashes.
        sha256, bytes: of the file.
        shape: of the volume, `[D, H, W]` or `[C, D, H, W]`.
    """

    index: int
    seed: int
    sample: int
    conditions: dict[str, Any]
    file: str
    sha256: str
    bytes: int
    shape: tuple[int, ...]


def volume_name(index: int) -> str:
    """Where volume `index` lies below the dataset's folder."""
    return f"shard-{index // SHARD:05}/{index:08}.nii.gz"


def read_manifest(folder: Path) -> Iterator[tuple[Entry, bytes]]:
    """Every whole line with its bytes. A last line without a newline was cut off while it was written: it is left out.

    Raises:
        ValueError: a line that is no entry, an index that stands twice.
    """
    seen: set[int] = set()
    try:
        with open(folder / MANIFEST, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    entry = Entry.model_validate_json(line)
                except ValidationError as error:
                    first = error.errors(include_url=False)[0]
                    where = ".".join(map(str, first["loc"]))
                    raise _altered(folder, number, f"{where} {first['msg']}".strip()) from error
                if entry.file != volume_name(entry.index):
                    raise _altered(folder, number, f"volume {entry.index} is not {entry.file[:80]}")
                if entry.index in seen:
                    raise _altered(folder, number, f"volume {entry.index} stands twice")
                seen.add(entry.index)
                yield entry, line
    except FileNotFoundError:
        return


def _altered(folder: Path, number: int, reason: str) -> ValueError:
    return ValueError(
        f"[dataset] {folder / MANIFEST} line {number}: {reason}; restore the file, or delete the line"
    )


def read_description(folder: Path) -> dict[str, Any]:
    """The content of `dataset.json` (ValueError: none there, or not an object)."""
    try:
        found = json.loads((folder / DESCRIPTION).read_bytes())
    except FileNotFoundError as error:
        raise ValueError(
            f"[dataset] {folder} holds no {DESCRIPTION}; give a folder written by `volcast generate`"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"[dataset] {folder / DESCRIPTION}: cannot read it ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"[dataset] {folder / DESCRIPTION} holds no object; restore it")  # noqa: TRY004  (a file's, not a caller's)
    return found


@final
class Check(Frozen):
    """What `check_dataset` found.

    Attributes:
        intact: how many volumes have the bytes of their line.
        missing, altered: files, below the dataset's folder.
        unlisted: files in shards without a line, as a killed run may leave one; the next run makes them again.
    """

    intact: int
    missing: tuple[str, ...]
    altered: tuple[str, ...]
    unlisted: tuple[str, ...]


def check_dataset(folder: Path, on_file: Callable[[], object] = lambda: None) -> Check:
    """Compare the sha256 of every file with its line; `on_file` is called after each.

    Raises:
        ValueError: no dataset there, a line that is no entry, a file that cannot be read.
    """
    read_description(folder)
    intact: set[str] = set()
    missing: list[str] = []
    altered: list[str] = []
    for entry, _ in read_manifest(folder):
        try:
            same = sha256(folder / entry.file) == entry.sha256
        except (FileNotFoundError, NotADirectoryError):
            missing.append(entry.file)
        except OSError as error:
            raise ValueError(f"[dataset] cannot read {folder / entry.file}: {error.strerror}") from error
        else:
            intact.add(entry.file) if same else altered.append(entry.file)
        on_file()
    files = {path.relative_to(folder).as_posix() for path in folder.glob("shard-*/*")}
    unlisted = tuple(sorted(files - intact - {*altered}))
    return Check(intact=len(intact), missing=tuple(missing), altered=tuple(altered), unlisted=unlisted)
