"""The peak counts memory that was given back, and only since the measurement began; what is freed goes back at once."""

import subprocess
import sys

import numpy as np
import pytest

from volcast.runtime.memory import PeakMemory


def test_a_peak_is_seen_and_reset() -> None:
    before = PeakMemory().bytes()
    memory = PeakMemory()
    block = np.ones(2**25)  # 256 MiB, touched
    del block
    peak = memory.bytes()
    assert peak - before > 0.9 * 2**28
    again = PeakMemory()
    assert again.since_start_of_process or again.bytes() < peak - 0.9 * 2**27


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
def test_what_a_thread_freed_is_not_kept() -> None:
    """As an engine's thread does: a large block, after which smaller ones lie on the thread's own heap."""
    code = """
import ctypes, threading
from volcast.runtime.memory import give_back, give_back_at_once, resident_bytes

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def use(*sizes):
    blocks = [libc.malloc(size * 2**20) for size in sizes]
    for block, size in zip(blocks, sizes):
        libc.memset(block, 1, size * 2**20)
    for block in blocks:
        libc.free(block)

def work():
    use(30)
    use(12, 12, 12)

give_back_at_once()
before = resident_bytes()
thread = threading.Thread(target=work)
thread.start()
thread.join()
give_back()
print(resident_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Without it 36 MiB stay; Python's own thread takes well under one.
    assert int(done.stdout) < 8 * 2**20
