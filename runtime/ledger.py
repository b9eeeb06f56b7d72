"""How much memory of a device is taken by objects that are alive."""

from __future__ import annotations

import threading
import weakref
from typing import final


@final
class Ledger:
    """Bytes on a device. Safe from any thread.

    Attributes:
        peak: the most that there were at once since `restart`.
    """

    def __init__(self) -> None:
        self._live = self.peak = 0
        self._lock = threading.RLock()  # an object may die while another is entered

    def enter(self, owner: object, size: int) -> None:
        """`owner` has so many bytes until it is gone."""
        with self._lock:
            self._live += size
            self.peak = max(self.peak, self._live)
        weakref.finalize(owner, self._leave, size)

    def restart(self) -> None:
        with self._lock:
            self.peak = self._live

    def _leave(self, size: int) -> None:
        with self._lock:
            self._live -= size
