"""Files and folders that appear whole under their final name, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EFBIG: "the file would pass the size limit (ulimit -f); raise it or write elsewhere",
    errno.EACCES: "the folder is not writable; choose another one",
    errno.EPERM: "the folder is not writable; choose another one",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "the folder does not exist; create it first",
    errno.ENOTDIR: "a parent of it is a file; choose another folder",
    errno.EISDIR: "it is a folder; give a file name",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


def write_error(path: Path, error: OSError) -> ValueError:
    """The one-line error, with the remedy, for a file or folder that cannot be written."""
    return ValueError(f"[write] {path}: {_REMEDIES.get(error.errno or 0, error.strerror or str(error))}")


def _open_mode() -> int:
    # mkstemp makes private files; a result should get the mode that open() would have given it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well.

    The temporary name keeps the suffixes of `path` (`.nii.gz`), since writers choose a format by them. On any error
    or interrupt it is removed and an older file at `path` stays as it was.

    Raises:
        ValueError: the disk is full, or the folder is missing or not writable (one line, with the remedy).
    """
    path = Path(path)
    # Named before it is made: an interrupt at any moment finds what to remove.
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}" + "".join(path.suffixes[-2:]))
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_open_mode())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` when the block ends well.

    With `replace` a folder that already stands there is exchanged for the new one; without, it is an error. On any
    error or interrupt the temporary folder is removed.

    Raises:
        ValueError: `path` exists (and not `replace`), or is a file; disk full; parent missing or not writable.
    """
    path = Path(path)
    if os.path.lexists(path) and (not replace or path.is_symlink() or not path.is_dir()):
        raise ValueError(f"[write] {path} exists; remove it or choose another name")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
    except OSError as error:
        raise write_error(path, error) from error
    old: Path | None = None
    try:
        yield temporary
        mask = _open_mode()
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                with open(Path(folder, name), "rb+") as stream:
                    os.fsync(stream.fileno())
                    # safetensors makes private files, which another user could not serve.
                    os.fchmod(stream.fileno(), os.fstat(stream.fileno()).st_mode & 0o777 | 0o666 & ~mask)
            sync_folder(Path(folder))
        os.chmod(temporary, 0o777 & ~mask)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".old-{path.name}-", dir=path.parent))
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            if old is not None and not path.exists():
                os.rename(old, path)
                old = None
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        for rest in (temporary, old):
            if rest is not None:
                shutil.rmtree(rest, ignore_errors=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's sha256, 64 lower-case hexadecimal digits (OSError if it cannot be read)."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
