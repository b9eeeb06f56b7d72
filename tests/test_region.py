"""Volumes through a file in /dev/shm: what is written comes back, nothing else can be named, and nothing stays."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from volcast.runtime.region import FOLDER, Region, make_region, open_region

A_NAME = "volcast-region-" + "0f" * 16


def a_name() -> str:
    return f"volcast-region-{secrets.token_hex(16)}"


def test_arrays_come_back_and_their_memory_goes() -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((40, 50, 60)).astype(np.float32),
        rng.standard_normal((3, 5)).astype(np.float16),
        rng.integers(0, 2**16, (7, 9, 11), np.uint16)[:, ::2],  # not contiguous
        np.arange(5000, dtype=np.uint8),
    ]
    with make_region() as client, open_region(client.name) as server:
        places = [server.write(array) for array in arrays]
        assert os.fstat(client._descriptor).st_blocks * 512 >= sum(array.nbytes for array in arrays)
        for place, array in reversed(list(zip(places, arrays, strict=True))):
            back = client.take(place, array.shape, array.dtype.name)
            assert back.dtype == array.dtype and back.flags.writeable
            np.testing.assert_array_equal(back, array)
        assert os.fstat(client._descriptor).st_blocks == 0


def test_the_name_is_gone_as_soon_as_the_server_has_it() -> None:
    with make_region() as client:
        assert (FOLDER / client.name).stat().st_mode & 0o777 == 0o600
        with open_region(client.name):
            assert not (FOLDER / client.name).exists()
        with pytest.raises(ValueError, match="No such file"):
            open_region(client.name)


def test_a_region_that_nobody_opened_is_removed_by_its_maker() -> None:
    with pytest.raises(KeyError), make_region() as client:
        raise KeyError
    assert not (FOLDER / client.name).exists()
    client.close()


@pytest.mark.parametrize(
    "name",
    ["", "volcast", "../etc/passwd", "volcast-region-", f"/dev/shm/{A_NAME}", f"../shm/{A_NAME}", A_NAME + "\n",
     A_NAME.upper(), A_NAME + "0", "volcast-region-\0" + "0" * 31],
)  # fmt: skip
def test_no_other_name_is_opened(name: str) -> None:
    with pytest.raises(ValueError, match="need the name of a region") as caught:
        open_region(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"somebody's"),
        lambda path: path.symlink_to("/etc/hostname"),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
        lambda path: None,
    ],
    ids=["holds something", "symbolic link", "folder", "pipe", "missing"],
)
def test_no_other_file_is_opened(make: Callable[[Path], object]) -> None:
    path = FOLDER / a_name()
    try:
        make(path)
        before = path.is_symlink() or path.exists()
        descriptors = set(os.listdir("/proc/self/fd"))
        with pytest.raises(ValueError, match=r"^\[request\] region="):
            open_region(path.name)
        assert set(os.listdir("/proc/self/fd")) <= descriptors
        assert (path.is_symlink() or path.exists()) == before
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def test_a_file_with_a_second_name_is_not_opened() -> None:
    with make_region() as client:
        other = FOLDER / a_name()
        os.link(FOLDER / client.name, other)
        try:
            with pytest.raises(ValueError, match="one name"):
                open_region(client.name)
        finally:
            other.unlink()


def test_a_full_file_system_is_an_error() -> None:
    region = Region(a_name(), os.open("/dev/full", os.O_RDWR))
    with region, pytest.raises(ValueError, match="is full: give it more room, or use no shared memory"):
        region.write(np.zeros(10, np.float32))


@pytest.mark.parametrize(
    ("offset", "shape"), [(-4096, (1,)), (1, (1,)), (0, (5000,)), (4096, (1024,)), (0, (0,)), (0, (-1,))]
)
def test_what_is_not_there_cannot_be_taken(offset: int, shape: tuple[int, ...]) -> None:
    with make_region() as region:
        region.write(np.zeros(1024, np.float32))
        with pytest.raises(ValueError, match="no float32"):
            region.take(offset, shape, "float32")
