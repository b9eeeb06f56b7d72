"""Volumes that wait for their callers: bounded in bytes and age, under names that cannot be guessed."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import final

from .refusal import Refusal


@final
@dataclass(kw_only=True)
class Stored:
    """A `.nii.gz`. Only the key named `owner` may have it; `fetched`: it has been asked for."""

    content: bytes
    owner: str
    filename: str
    preview: bool
    until: float
    fetched: bool = False

    @property
    def worth(self) -> int:
        """What has to make room first: previews, then what was fetched."""
        return 0 if self.preview else 1 if self.fetched else 2


@final
class VolumeStore:
    """For one thread."""

    def __init__(self, most_bytes: int, seconds: float) -> None:
        self._most, self._seconds = most_bytes, seconds
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self.bytes = 0

    def put(self, content: bytes, *, owner: str, filename: str, preview: bool) -> str:
        """Keep it; the name that `get` takes. Raises `Refusal` (too_large): nothing that is worth less can go for it."""
        self.expire()
        one = Stored(
            content=content, owner=owner, filename=filename, preview=preview,
            until=time.monotonic() + self._seconds,
        )  # fmt: skip
        # A volume may push out even one that was not fetched; a preview may not.
        weaker = sorted(
            (name for name, other in self._kept.items() if other.worth <= one.worth),
            key=lambda name: self._kept[name].worth,
        )
        room = self._most - self.bytes
        if room + sum(len(self._kept[name].content) for name in weaker) < len(content):
            raise Refusal("too_large", f"[gateway] {len(content)} bytes find no place among the volumes kept; ask for a smaller size")  # fmt: skip
        for name in weaker:
            if self._most - self.bytes >= len(content):
                break
            self._drop(name)
        key = secrets.token_urlsafe(16)
        self._kept[key] = one
        self.bytes += len(content)
        return key

    def get(self, key: str, owner: str) -> Stored | None:
        self.expire()
        one = self._kept.get(key)
        return one if one is not None and one.owner == owner else None

    def waiting(self) -> int:
        """Volumes that nobody has fetched yet."""
        self.expire()
        return sum(one.worth == 2 for one in self._kept.values())

    def expire(self) -> None:
        now = time.monotonic()
        while self._kept:
            key, one = next(iter(self._kept.items()))
            if one.until > now:
                break
            self._drop(key)

    def _drop(self, key: str) -> None:
        self.bytes -= len(self._kept.pop(key).content)
