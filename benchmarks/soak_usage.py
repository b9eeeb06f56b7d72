"""What the processes of a `volcast serve` hold: memory, threads, file descriptors, files in /dev/shm."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

SHARED_MEMORY = Path("/dev/shm")
STUB, TRITON, OWN = "triton_python_backend_stub", "bin/tritonserver", "volcast serve"
"""The model's process, the server, and who watches them."""


@final
@dataclass(frozen=True, kw_only=True)
class Usage:
    """Of one process."""

    resident_mib: float
    threads: int
    descriptors: int


def processes(supervisor: int) -> list[tuple[str, int]]:
    """Name and id of each process of the `volcast serve` with the id `supervisor`."""
    found = [(OWN, supervisor)]
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            command = (folder / "cmdline").read_bytes().decode()
            name = next((one for one in (STUB, TRITON) if one in command), None)
            if name is not None and _descends(int(folder.name), supervisor):
                found.append((name, int(folder.name)))
    return found


def usage(supervisor: int) -> dict[str, Usage]:
    """Of each process, by name."""
    found = {}
    for name, process in processes(supervisor):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        found[name] = Usage(
            resident_mib=round(int(status["VmRSS"].split()[0]) / 1024, 1), threads=int(status["Threads"]),
            descriptors=len(os.listdir(f"/proc/{process}/fd")),
        )  # fmt: skip
    return found


def shared_memory(supervisor: int) -> list[str]:
    """The names of its files in /dev/shm, and of what clients left there."""
    patterns = (f"volcast_{supervisor}_*", "volcast-region-*")
    return [file.name for pattern in patterns for file in SHARED_MEMORY.glob(pattern)]


def _descends(process: int, wanted: int) -> bool:
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        if process == wanted:
            return True
    return False
