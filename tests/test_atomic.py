"""Nothing half-written ever stands under a final name."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from volcast.runtime.atomic import atomic_file, atomic_folder, sha256


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_with_the_mode_of_open(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    with atomic_file(tmp_path / "out.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz") and temporary.parent == tmp_path
        temporary.write_text("new")
        assert not (tmp_path / "out.nii.gz").exists()
    assert (tmp_path / "out.nii.gz").read_text() == "new"
    assert (tmp_path / "out.nii.gz").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert names(tmp_path) == ["out.nii.gz", "plain"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "out").write_text("old")
    with pytest.raises(error), atomic_file(tmp_path / "out") as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "old"


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "artifact") as temporary:
        (temporary / "engines").mkdir()
        (temporary / "engines" / "a").write_text("1")
        assert names(tmp_path) == [temporary.name]
    assert names(tmp_path) == ["artifact"] and (tmp_path / "artifact/engines/a").read_text() == "1"
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "second") as temporary:
        (temporary / "a").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["artifact"]


def test_files_in_a_folder_are_for_whom_open_makes_them(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "artifact") as temporary:
        for name, mode in (("private", 0o600), ("program", 0o755)):
            (temporary / name).write_text("")
            (temporary / name).chmod(mode)
    (tmp_path / "plain").write_text("")
    usual = (tmp_path / "plain").stat().st_mode & 0o777
    assert (tmp_path / "artifact/private").stat().st_mode & 0o777 == usual
    assert (tmp_path / "artifact/program").stat().st_mode & 0o777 == usual | 0o755


def test_a_folder_is_exchanged_only_when_asked_and_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    target.mkdir()
    (target / "old").write_text("")
    with pytest.raises(ValueError, match="exists; remove it"), atomic_folder(target):
        pass
    with pytest.raises(RuntimeError), atomic_folder(target, replace=True) as temporary:
        raise RuntimeError
    assert names(target) == ["old"]
    with atomic_folder(target, replace=True) as temporary:
        (temporary / "new").write_text("")
    assert names(target) == ["new"] and names(tmp_path) == ["artifact"]


def test_a_folder_never_takes_the_place_of_a_file_or_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(ValueError, match="exists"), atomic_folder(tmp_path / name, replace=True):
            pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/out.nii", "does not exist; create it"),
        ("file/out.nii", "a parent of it is a file"),
        (".", "it is a folder"),
        ("x" * 300, "too long"),
    ],
)
def test_an_impossible_place_is_told_in_one_line(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message) as error, atomic_file(tmp_path / path) as temporary:
        temporary.write_text("x")
    assert "\n" not in str(error.value) and names(tmp_path) == ["file"]


def test_no_room_is_told_in_one_line(tmp_path: Path) -> None:
    # RLIMIT_FSIZE stands for a full disk: the write fails half-way, with EFBIG instead of ENOSPC.
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ValueError, match="size limit") as error, atomic_file(tmp_path / "out") as path:
            path.write_bytes(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value) and names(tmp_path) == []


def test_a_full_device_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the disk is full"), atomic_file(tmp_path / "out"):
        Path("/dev/full").write_bytes(b"x")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="not writable"), atomic_file(tmp_path / "out"):
        pass


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path: Path, kind: str) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        f"from volcast.runtime.atomic import {kind}\n"
        f"with {kind}({str(tmp_path / 'out')!r}) as path:\n"
        "    (path / 'a' if path.is_dir() else path).write_text('half')\n"
        "    print('writing', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        process.kill()
        process.wait()
    assert not (tmp_path / "out").exists()
    assert len(names(tmp_path)) == 1


def test_sha256_is_that_of_the_standard(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
