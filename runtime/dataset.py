"""A dataset of sampled volumes on disk, which a run may leave at any moment and another take up.

Layout:

    dataset.json                       what the volumes were made with (`generate.describe`)
    manifest.jsonl                     a line a volume (`dataset_manifest.Entry`), in the order in which they were finished
    shard-00012/00012345.nii.gz        volume 12345; a shard holds at most SHARD volumes
    .lock, .parts-*                    the run that writes; parts of volumes

Why nothing is lost and nothing is there twice: one process (the holder of `.lock`) publishes. For each volume it waits
for a whole file in `.parts-*` that is on the disk already, then (1) renames it to its place, (2) waits until the name is
on the disk, (3) appends its line in one write and waits until that is on the disk. A line therefore never speaks of a
file that is not whole; a file without a line, and a last line without its newline, are made again by the next run. Who
is killed between the steps changes nothing in this. An index has one file name, and its line is written at most once, by
a process that has read all lines before. Workers only ever write into `.parts-*`, whose name the run draws: one that
outlives its run cannot touch what a later run publishes.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, final

from .atomic import atomic_file, sync_folder, write_error
from .dataset_manifest import DESCRIPTION, MANIFEST, Entry, read_description, read_manifest


@final
class Dataset:
    """A dataset open for writing; see `open_dataset`.

    Attributes:
        folder: of the dataset.
        parts: the folder in which workers write files.
        done: the indices that are published.
        dropped: how many lines the last run left whose file is gone or has another size.
    """

    def __init__(self, folder: Path, parts: Path, done: set[int], dropped: int, manifest: BinaryIO) -> None:
        self.folder = folder
        self.parts = parts
        self.done = done
        self.dropped = dropped
        self._manifest = manifest
        self._shards: set[str] = set()

    def publish(self, entry: Entry, part: Path) -> bool:
        """Give the whole file `part` its name and its line; False if the volume was there already.

        Raises:
            ValueError: no room, not writable. The volume does not count then.
        """
        if entry.index in self.done:
            part.unlink(missing_ok=True)
            return False
        place = self.folder / entry.file
        try:
            if place.parent.name not in self._shards:
                place.parent.mkdir(exist_ok=True)
                sync_folder(self.folder)
                self._shards.add(place.parent.name)
            os.replace(part, place)
            sync_folder(place.parent)
            line = entry.model_dump_json().encode() + b"\n"
            # Unbuffered: a full disk shows here, and never in a later close.
            while line:
                line = line[self._manifest.write(line) :]
            os.fsync(self._manifest.fileno())
        except OSError as error:
            raise write_error(place, error) from error
        self.done.add(entry.index)
        return True


@contextmanager
def open_dataset(folder: Path, description: Mapping[str, Any]) -> Iterator[Dataset]:
    """Make or take up the dataset in `folder`; its parent exists.

    Lines whose file is gone or has another size are dropped, so that their volumes are made again.

    Raises:
        ValueError: a folder with something else in it, another run is writing, other settings (by name), not writable.
    """
    _refuse_foreign(folder)
    parts = folder / f".parts-{secrets.token_hex(8)}"
    with ExitStack() as stack:
        try:
            folder.mkdir(exist_ok=True)
            _lock(folder, stack.enter_context(open(folder / ".lock", "ab")))
            _remove_parts(folder)
            stack.callback(_remove_parts, folder)
            _describe(folder, description)
            done, dropped = _repair(folder)
            parts.mkdir()
            manifest = stack.enter_context(open(folder / MANIFEST, "ab", buffering=0))
            sync_folder(folder)
        except OSError as error:
            raise write_error(folder, error) from error
        yield Dataset(folder, parts, done, dropped, manifest)


def _lock(folder: Path, file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"[dataset] another run is writing to {folder}; wait for it, or choose another folder"
        ) from error


def _refuse_foreign(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"[dataset] {folder} is a file; choose another folder")
    if (folder / DESCRIPTION).exists():
        return
    strange = sorted(
        name for name in os.listdir(folder) if not name.startswith((".lock", ".parts-", ".tmp-"))
    )
    if strange:
        raise ValueError(
            f"[dataset] {folder} holds {strange[0]} but no {DESCRIPTION}; choose a new or an empty folder"
        )


def _describe(folder: Path, description: Mapping[str, Any]) -> None:
    if (folder / DESCRIPTION).exists():
        found = read_description(folder)
        wanted = json.loads(json.dumps(description))
        other = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if not other:
            return
        if next(read_manifest(folder), None) is not None:
            name = other[0]
            raise ValueError(
                f"[dataset] {folder} was begun with {name} {json.dumps(found.get(name))}, not "
                f"{json.dumps(wanted.get(name))}; give the same settings, or choose another folder"
            )
    with atomic_file(folder / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(description, indent=1) + "\n")


def _repair(folder: Path) -> tuple[set[int], int]:
    """The indices that are there, and how many lines went. The manifest ends in a newline afterwards."""
    done: set[int] = set()
    dropped = whole = 0
    for entry, line in read_manifest(folder):
        whole += len(line)
        if _size(folder / entry.file) == entry.bytes:
            done.add(entry.index)
        else:
            dropped += 1
    manifest = folder / MANIFEST
    if dropped:
        with atomic_file(manifest) as temporary, open(temporary, "wb") as stream:
            stream.writelines(line for entry, line in read_manifest(folder) if entry.index in done)
    elif _size(manifest) not in (None, whole):
        os.truncate(manifest, whole)
    return done, dropped


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remove_parts(folder: Path) -> None:
    for path in folder.glob(".parts-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".tmp-*"):
        with suppress(OSError):
            path.unlink()
