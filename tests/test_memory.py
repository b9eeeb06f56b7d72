"""The peak counts memory that was given back, and only since the measurement began."""

import numpy as np

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
