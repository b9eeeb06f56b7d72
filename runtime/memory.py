"""The process's resident memory, and what the C library's allocator keeps of it."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path
from typing import final

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers for them (malloc.h)."""
KEPT = 2 * 2**20
"""Bytes of a block that the allocator may keep when it is freed."""


@final
class PeakMemory:
    """Measures the peak from its creation on, where Linux allows the reset, else since the process began."""

    def __init__(self) -> None:
        try:
            # "5" resets VmHWM (proc_pid_clear_refs(5)).
            Path("/proc/self/clear_refs").write_text("5")
            self.since_start_of_process = False
        except OSError:
            self.since_start_of_process = True

    def bytes(self) -> int:
        """The peak so far, in bytes."""
        found = _status("VmHWM")
        if found is not None:
            return found
        # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """What is resident now; where that cannot be told, the peak so far."""
    found = _status("VmRSS")
    return PeakMemory().bytes() if found is None else found


def give_back() -> None:
    """Free memory that the allocator keeps goes to the operating system: after files were read, programs closed.

    glibc keeps what it freed below memory still in use; elsewhere nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def give_back_at_once() -> None:
    """From now on large blocks go to the operating system when they are freed.

    Without it glibc puts blocks of up to 32 MiB on its heaps once a few were freed, one heap for each of an engine's
    threads, and neither `give_back` nor a block of another thread gets what lies free at the end of such a heap.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, KEPT)
        set_option(M_TRIM_THRESHOLD, KEPT)


def _status(name: str) -> int | None:
    try:
        found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
