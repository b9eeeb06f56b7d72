"""What runs threads of its own is closed before the interpreter ends."""

from __future__ import annotations

import atexit
import os
from typing import Protocol
from weakref import WeakSet


class Closable(Protocol):
    """What ends its threads when it is closed, and may be closed twice."""

    def close(self) -> None: ...


_open: WeakSet[Closable] = WeakSet()


def close_at_exit(one: Closable) -> None:
    """Close `one` when the interpreter ends, if it lives until then.

    A thread that comes back from C++ to an interpreter that is gone aborts the process.
    """
    _open.add(one)


def _close() -> None:
    for one in list(_open):
        one.close()


# Runs while threads may still take the GIL.
atexit.register(_close)
# A forked child has none of the threads, and perhaps a lock that one of them held.
os.register_at_fork(after_in_child=_open.clear)
