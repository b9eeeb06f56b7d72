"""ONNX Runtime's arena for CPU memory, without memory: how much of it a sequence of buffers touches.

Its rules (onnxruntime/core/framework/bfc_arena.cc): a buffer lies in the smallest free chunk that holds it, and only
chunks of twice its size, or 128 MiB more, are split; where there is none, a region is added whose size is the last one's,
doubled until the buffer fits, and doubled up to 1 GiB from then on; free neighbours in a region are joined. Memory that
no buffer has lain in yet takes none.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import final

MIB = 2**20
ROUNDED = 256
FIRST_REGION, LARGEST_DOUBLED = MIB, 2**30
DEAD = 128 * MIB


@final
@dataclass
class _Chunk:
    size: int
    before: int | None
    after: int | None
    free: bool


@final
class Arena:
    """A `liveness.Memory`."""

    def __init__(self) -> None:
        self._region, self._end = FIRST_REGION, 0
        self._chunks: dict[int, _Chunk] = {}  # by address; regions do not touch
        self._free: list[tuple[int, int]] = []  # (size, address), sorted
        self._touched: list[tuple[int, int]] = []  # [first, last), sorted and apart after `_join`

    @property
    def touched(self) -> int:
        """Bytes that any buffer has lain in."""
        self._join()
        return sum(last - first for first, last in self._touched)

    @property
    def bookkeeping(self) -> int:
        """Bytes of its own: a number for every 256 of all regions."""
        return sum(chunk.size for chunk in self._chunks.values()) // ROUNDED * 8

    def take(self, size: int) -> int:
        size = max(ROUNDED, -(-size // ROUNDED) * ROUNDED)
        place = bisect_left(self._free, (size, -1))
        if place == len(self._free):
            self._extend(size)
            place = bisect_left(self._free, (size, -1))
        _, address = self._free.pop(place)
        chunk = self._chunks[address]
        chunk.free = False
        if chunk.size >= 2 * size or chunk.size - size >= DEAD:
            rest = _Chunk(chunk.size - size, address, chunk.after, True)
            if chunk.after is not None:
                self._chunks[chunk.after].before = address + size
            chunk.size, chunk.after = size, address + size
            self._chunks[address + size] = rest
            insort(self._free, (rest.size, address + size))
        self._touched.append((address, address + size))
        if len(self._touched) > 256:
            self._join()
        return address

    def give(self, buffer: int) -> None:
        chunk = self._chunks[buffer]
        chunk.free = True
        if chunk.after is not None and self._chunks[chunk.after].free:
            self._merge(buffer, chunk.after)
        if chunk.before is not None and self._chunks[chunk.before].free:
            buffer = chunk.before
            self._free.remove((self._chunks[buffer].size, buffer))
            self._merge(buffer, self._chunks[buffer].after or 0, listed=False)
        insort(self._free, (self._chunks[buffer].size, buffer))

    def _merge(self, first: int, second: int, listed: bool = True) -> None:
        """Free chunks that touch become one; `listed`: the second is among the free ones."""
        into, gone = self._chunks[first], self._chunks.pop(second)
        if listed:
            self._free.remove((gone.size, second))
        into.size, into.after = into.size + gone.size, gone.after
        if gone.after is not None:
            self._chunks[gone.after].before = first

    def _extend(self, size: int) -> None:
        grown = False
        while size > self._region:
            self._region, grown = 2 * self._region, True
        region = self._region
        if not grown:
            self._region = min(LARGEST_DOUBLED, 2 * region)
        self._chunks[self._end] = _Chunk(region, None, None, True)
        insort(self._free, (region, self._end))
        self._end += region + ROUNDED

    def _join(self) -> None:
        joined: list[tuple[int, int]] = []
        for first, last in sorted(self._touched):
            if joined and first <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(joined[-1][1], last)
            else:
                joined.append((first, last))
        self._touched = joined
