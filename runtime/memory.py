"""The peak of the process's resident memory."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import final


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
        try:
            found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        except OSError:
            found = None
        if found:
            return int(found[1]) * 1024
        # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
