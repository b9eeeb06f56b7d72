"""A memory limit: what an artifact's programs take, and how a decode fits into what is left."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from .engine import shapes
from .footprint import Footprint
from .sizes import related_sizes
from .slab_schedule import Pass
from .slab_search import Outcome
from .slabs import SlabProgram
from .spec import ArtifactSpec

if TYPE_CHECKING:
    from .job import Job

Sizes = Mapping[str, int]
"""By axis: `batch`, `steps`, `d0`, .."""
RESERVE = 20
"""One part in so many of a limit is left for what a prediction misses."""
Opened = tuple[str, Sizes]
"""A program by its name, and its sizes."""


@final
@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """How latents are decoded.

    Attributes:
        batch: latents a call of the whole program; 0: one after the other, in slabs.
        program, passes: the slabs.
        peak: bytes beyond what is there before, the images counted.
        slabs: of all passes, for one latent.
    """

    batch: int
    program: SlabProgram | None = None
    passes: tuple[Pass, ...] = ()
    peak: int
    slabs: int = 0


class MemoryLimit(ABC):
    """Predictions for one artifact on one engine, which holds none of its programs yet.

    Attributes:
        limit: bytes; None: no limit.
        base: bytes before the first program is opened.
        taken: bytes that other threads take meanwhile (`BatchMemory`).
    """

    def __init__(self, spec: ArtifactSpec, limit: int | None, base: int) -> None:
        self._spec, self.limit, self.base = spec, limit, base
        self.taken = 0
        self._plans: dict[tuple[str, int], DecodePlan] = {}

    @abstractmethod
    def footprint(self, name: str, sizes: Sizes) -> Footprint:
        """One of the artifact's programs; of `sizes` it takes the axes that it has."""

    @abstractmethod
    def image_bytes(self, sizes: Sizes) -> int:
        """Bytes that one latent's image takes beside those that are decoded after it."""

    @abstractmethod
    def plan_slabs(self, sizes: Sizes, room: float) -> Outcome:
        """The slabs for one latent within `room` bytes; where none fit, those that take least.

        Raises ValueError where the artifact has no segments for slabs, or the engine none that it could run.
        """

    def check(self, sizes: Sizes) -> int:
        """The peak while a batch of these sizes is sampled and decoded, bytes.

        Raises ValueError, with the least that would do, where that is above the limit.
        """
        opened: list[Opened] = []
        peak = 0
        for name in ("schedule", "prepare", "step"):
            if name in self._spec.programs:
                peak = max(peak, self.held(opened) + self.footprint(name, sizes).peak)
                self._within(peak, f"{name} of {_shown(sizes)}")
                opened.append((name, sizes))
        if "decode" in self._spec.programs:
            peak = max(peak, self.held(opened) + self.plan_decode(sizes, opened).peak)
        return self.base + peak

    def check_decode(self, sizes: Sizes) -> None:
        """Raise ValueError, with the least that would do, unless latents can be decoded beside what is taken."""
        if "decode" in self._spec.programs:
            self.plan_decode(sizes, ())
        else:
            self._within(self.held(()), f"step of {_shown(sizes)}")

    def check_encode(self, sizes: Sizes, opened: Iterable[Opened]) -> None:
        """Raise ValueError, with the least that would do, unless an image can be encoded beside what is open."""
        self._within(self.held(opened) + self.footprint("encode", sizes).peak, f"encode of {_shown(sizes)}")

    def held(self, opened: Iterable[Opened]) -> int:
        """Bytes of programs that are open, and what is taken besides."""
        return self.taken + sum(self.footprint(*one).held for one in opened)

    def plan_decode(self, sizes: Sizes, opened: Iterable[Opened]) -> DecodePlan:
        """How `sizes["batch"]` latents are decoded beside programs that are open: whole where that fits, else in slabs.

        Raises ValueError, with the least that would do, where nothing fits.
        """
        others = self.held(opened)
        key = str(shapes(self._spec.programs["decode"], sizes)), others
        if key not in self._plans:
            self._plans[key] = self._plan_decode(sizes, others)
        return self._plans[key]

    def count_slabs(self, sizes: Sizes, passes: Iterable[Pass]) -> int:
        """Of all passes together."""
        program = self._slab_program(sizes)
        return sum(len(program.slabs(one.indices, one.height).starts) for one in passes)

    def _plan_decode(self, sizes: Sizes, others: int) -> DecodePlan:
        batch = sizes["batch"]
        whole = DecodePlan(batch=batch, peak=self.footprint("decode", sizes).peak)
        room = float("inf") if self.limit is None else self.limit - self.limit // RESERVE - self.base - others
        if whole.peak <= room:
            return whole
        images = batch * self.image_bytes(sizes) if batch > 1 else 0
        alone = DecodePlan(batch=1, peak=self.footprint("decode", {**sizes, "batch": 1}).peak + images)
        if alone.peak <= room:
            return alone
        outcome = self.plan_slabs(sizes, room - images)
        self._within(others + min(alone.peak, int(outcome.peak) + images), f"decode of {_shown(sizes)}")
        return DecodePlan(
            batch=0,
            program=self._slab_program(sizes),
            passes=outcome.passes,
            peak=int(outcome.peak) + images,
            slabs=self.count_slabs(sizes, outcome.passes),
        )

    def _slab_program(self, sizes: Sizes) -> SlabProgram:
        if self._spec.slabs is None:
            raise ValueError(
                "[decode] memory_limit: the decode does not fit, and the artifact has no segments for slabs "
                f"({self._spec.provenance.get('slabs', 'an older export')}); export the model again, or raise the limit"
            )
        latent = self._spec.programs["decode"].inputs[0].shape
        return SlabProgram(
            self._spec.slabs, [size if isinstance(size, int) else sizes[size] for size in latent[2:]]
        )

    def _within(self, needed: int, what: str) -> None:
        least = -(-(self.base + needed) * RESERVE // (RESERVE - 1))
        if self.limit is not None and least > self.limit:
            raise ValueError(
                f"[sample] memory_limit={self.limit}: {what} needs at least {least} bytes, "
                f"{self.base} of them before any program is open; raise the limit, or give a smaller size or batch"
            )


def job_sizes(spec: ArtifactSpec, job: Job, batch: int) -> dict[str, int]:
    """The axes of all programs that a batch of a job runs."""
    sizes = {"batch": batch, "steps": len(job.plan)}
    given = {
        condition.name: (condition.shape, job.conditional[0][condition.name].shape)
        for condition in spec.conditions
    }
    x = next(tensor for tensor in spec.programs["step"].inputs if tensor.name == "x")
    for names, numbers in [(x.shape[1:], job.shape), *given.values()]:
        sizes |= {name: size for name, size in zip(names, numbers, strict=True) if isinstance(name, str)}
    return related_sizes(spec, sizes) | sizes


def _shown(sizes: Sizes) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items() if axis != "steps")
