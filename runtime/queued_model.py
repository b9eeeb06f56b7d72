"""What models have in common whose samples are made one after the other: their queue, and the parts of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Self

from .engine import Engine
from .programs import Programs
from .queueing import Queueing
from .request import SAMPLES_OF_A_SEED
from .sizes import check_size, whole
from .spec import Manifest


class QueuedModel(ABC):
    """An opened artifact with programs, and a queue that its `submit` fills. End it with `close`.

    Attributes:
        engine: what runs it: `name`, `threads`.
    """

    def __init__(self, folder: Path, spec: Manifest, engine: Engine, most: int) -> None:
        """`most`: samples of `submit` that are open."""
        self.engine = engine
        self._folder = folder
        self._programs = Programs(folder, spec, engine)
        self._queueing = Queueing(most)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _opened_again(self) -> Self:
        """The same model with programs of its own."""

    @cached_property
    def _worker(self) -> Self:
        """What the queue's thread alone uses."""
        return self._opened_again()

    @property
    def queueing(self) -> Queueing:
        """What `submit` fills, to look at."""
        return self._queueing

    def close(self, *, drain: bool = False) -> None:
        """End what `submit` started: finish the samples that wait (`drain`) or cancel them."""
        self._queueing.close(drain=drain)


def sample_parts(spec: Manifest, n: int, seed: int, batch: int) -> list[range]:
    """The samples of each batch of a run. ValueError: a number out of range, a batch that the artifact does not take."""
    for name, value, least, most in (
        ("seed", seed, 0, 2**64 - 1), ("n", n, 1, SAMPLES_OF_A_SEED), ("batch", batch, 1, SAMPLES_OF_A_SEED),
    ):  # fmt: skip
        if type(whole(value)) is not int or not least <= value <= most:
            raise ValueError(f"[sample] {name}={value!r}: need {least}..{most}")
    parts = [range(first, min(first + batch, n)) for first in range(0, n, batch)]
    for size in {len(parts[0]), len(parts[-1])}:
        check_size("sample", spec.axis("batch"), size)
    return parts
