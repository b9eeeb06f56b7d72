"""The sizes that a plan takes: a range for each axis of an artifact, from `--batch` and `--size`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from volcast.runtime.plans import Range
from volcast.runtime.programs import bind
from volcast.runtime.sizes import check_size, latent_sizes
from volcast.runtime.slabs import SlabProgram
from volcast.runtime.spec import ArtifactSpec

BATCH = (1, 8)
STEPS = 1000
"""Timesteps that one call of `schedule` takes at most, unless the model's own are more."""

Sizes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def axis_ranges(
    spec: ArtifactSpec, batch: tuple[int, int] | None = None, size: Sizes | None = None
) -> dict[str, Range]:
    """The range of each axis. `batch`: smallest and largest; left out: 1..8, as far as the artifact allows.

    `size`: smallest, tuned and largest spatial sizes of the latent; left out: the artifact's own and no other, which
    is the fastest. A volume's axis o0 is d0 times the autoencoder's factor.

    Raises ValueError for what the artifact's axes do not allow.
    """
    axes = {axis.name: axis for axis in spec.axes}
    ranges: dict[str, Range] = {}
    if "batch" in axes:
        axis = axes["batch"]
        smallest, largest = batch or (max(BATCH[0], axis.minimum), min(BATCH[1], axis.maximum))
        check_size("build", axis, smallest)
        check_size("build", axis, largest)
        ranges["batch"] = _range("batch", smallest, smallest, largest)
    if "steps" in axes:
        own = spec.scheduler.steps
        ranges["steps"] = Range(minimum=1, optimum=own, maximum=min(max(STEPS, own), axes["steps"].maximum))
    named = [latent_sizes(spec, one, "build")[1] for one in (size or (None, None, None))]
    for name in named[0]:
        ranges[name] = _range(name, *(sizes[name] for sizes in named))
    for name, axis in axes.items():
        source = f"d{name[1:]}"
        if name in ranges:
            continue
        if source not in ranges or not name.startswith("o"):
            raise ValueError(f"[build] axis {name} is none that a plan's sizes are known for; export again")
        factor = axis.multiple // axes[source].multiple
        one = ranges[source]
        ranges[name] = Range(
            minimum=factor * one.minimum, optimum=factor * one.optimum, maximum=factor * one.maximum
        )
    return ranges


def one_by_one(ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges of decode and encode, which run image by image: memory and bits do not depend on the batch."""
    one = Range(minimum=1, optimum=1, maximum=1)
    return {name: one if name == "batch" else each for name, each in ranges.items()}


def slab_ranges(spec: ArtifactSpec, ranges: Mapping[str, Range]) -> dict[str, dict[str, Range]]:
    """By the segment's name: the sizes of a slab, from its fewest rows at the smallest latent to all at the largest.

    Tuned for a quarter of the rows: slabs are run where the whole does not fit.
    """
    if spec.slabs is None:
        return {}
    latent = spec.programs["decode"].inputs[0].shape[2:]
    found: dict[str, dict[str, Range]] = {}
    for index, segment in enumerate(spec.slabs.segments):
        each: list[dict[str, int]] = []
        for which, share in (("minimum", 0), ("optimum", 4), ("maximum", 1)):
            sizes = [one if isinstance(one, int) else getattr(ranges[one], which) for one in latent]
            program = SlabProgram(spec.slabs, sizes)
            depth, step = program.depth(segment.value), program.step(index)
            rows = step if share == 0 else -(-depth // (share * step)) * step
            shapes = program.input_shapes(index, depth if segment.whole else rows)
            each.append(bind(segment.program.file, segment.program, shapes))
        found[Path(segment.program.file).stem] = {
            axis: _range(axis, *(sizes[axis] for sizes in each)) for axis in each[0]
        }
    return found


def parse_batch(text: str) -> tuple[int, int]:
    """`1:8` or `4`. ValueError for anything else."""
    parts = text.split(":")
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"[build] --batch {text!r}: need SMALLEST:LARGEST, such as 1:8, or one number")
    return int(parts[0]), int(parts[-1])


def parse_size(text: str) -> Sizes:
    """`8,12,8`, or smallest, tuned and largest as `4,4,4:8,12,8:16,16,16`. ValueError for anything else."""
    parts = [part.split(",") for part in text.split(":")]
    numbers = [part for one in parts for part in one]
    if len(parts) not in (1, 3) or not all(part.isascii() and part.isdecimal() for part in numbers):
        raise ValueError(
            f"[build] --size {text!r}: need latent sizes as 8,12,8, or a range as 4,4,4:8,12,8:16,16,16"
        )
    sizes = [tuple(map(int, one)) for one in parts]
    return (sizes[0], sizes[0], sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1], sizes[2])


def as_text(size: Sizes) -> str:
    """The sizes as `parse_size` reads them."""
    parts = [",".join(map(str, one)) for one in size]
    return parts[0] if len(set(parts)) == 1 else ":".join(parts)


def _range(name: str, smallest: int, tuned: int, largest: int) -> Range:
    if not smallest <= tuned <= largest:
        raise ValueError(
            f"[build] axis {name} {smallest}:{tuned}:{largest}: need smallest <= tuned <= largest"
        )
    return Range(minimum=smallest, optimum=tuned, maximum=largest)
