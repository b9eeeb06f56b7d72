"""Where a decoder is cut so that it can run slab by slab along its first spatial axis, with the whole volume's statistics.

A group norm needs the whole volume once, for its statistics; then it works on every number by itself. So the graph is
cut at what a norm reads, and into segments with at most one convolution between what they read and what they make:
between two cuts a row (a plane of a volume, a line of an image) needs rows nearby alone. What mixes all rows
(attention) becomes a segment that runs whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from .slab_rows import GraphRows


@final
@dataclass(frozen=True, order=True)
class Read:
    """Rows of a value that a segment reads: those under the rows it makes, `before` and `after` of them more.

    Outside the volume lie zeros, or with `edge` the volume's last row again. `masked`: what comes of them has to be
    zero (a norm lies between them and a convolution that pads with zeros).
    """

    value: str
    before: int = 0
    after: int = 0
    edge: bool = False
    masked: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Segment:
    """The nodes that make `target` of other cut values, in order. `reads`: by (node's place, which of its inputs)."""

    target: str
    nodes: tuple[int, ...]
    reads: Mapping[tuple[int, int], Read]
    whole: bool


@final
class SlabCut:
    """The segments of a decoder.

    Attributes:
        segments: in the order in which they run.
        scales: of every cut value, by how much each spatial axis is larger than the latent's.
        channels: of every cut value.

    Raises ValueError where it cannot be cut: values between do not grow by whole numbers, or are not float32.
    """

    def __init__(self, rows: GraphRows) -> None:
        self.rows, self._nodes = rows, rows.graph.nodes
        self._cuts = self._first_cuts()
        self.segments = self._settle()
        kept = {rows.input, *(segment.target for segment in self.segments)}
        self.scales = {name: rows.scales[name] for name in kept}
        self.channels = {name: rows.values[name].shape[1] for name in kept}

    def _first_cuts(self) -> set[str]:
        cuts = {self.rows.input, self.rows.output}
        for node in self._nodes:
            if node.inputs and all(name in self.rows.constants for name in node.inputs):
                continue
            volumes = [
                name for name in node.inputs if name in self.rows.scales and name not in self.rows.constants
            ]
            if not self.rows.is_local(node):
                cuts |= {name for name in volumes if not self.rows.is_zero(name)}
                continue
            wide = self.rows.window(node) is not None and not self.rows.is_zero(node.inputs[0])
            if wide or node.kind in ("GroupNormalization", "Resize"):
                # A convolution in int8 needs the pair beside it; a norm needs the statistics of what it reads.
                cuts.add(self.rows.unrounded(node.inputs[0]) if wide else node.inputs[0])
        return cuts

    def _settle(self) -> tuple[Segment, ...]:
        """Cut further until no work is in two segments, and no value is read with two windows inside one."""
        while True:
            closures = {target: self._closure(target) for target in self._cuts if target != self.rows.input}
            counts: dict[int, int] = {}
            for places in closures.values():
                for place in places:
                    counts[place] = counts.get(place, 0) + 1
            more = {
                name for place, count in counts.items() if count > 1
                for name in self._nodes[place].outputs
                if name in self.rows.scales and not self.rows.is_normed(name)
            }  # fmt: skip
            segments = []
            for target, places in sorted(closures.items(), key=lambda item: self.rows.maker[item[0]]):
                reads, uneven = self._reads(target, places)
                more |= uneven
                whole = not all(self.rows.is_local(self._nodes[place]) for place in self._computed(places))
                segments.append(Segment(target=target, nodes=tuple(places), reads=reads, whole=whole))
            unknown = {
                one.value for segment in segments for one in segment.reads.values()
            } - self.rows.scales.keys()
            unknown |= {segment.target for segment in segments} - self.rows.scales.keys()
            if unknown:
                raise ValueError(
                    f"[slabs] {min(unknown)} is no volume that grows by whole numbers: it cannot be cut"
                )
            if not more - self._cuts:
                return tuple(segments)
            self._cuts |= more

    def _computed(self, places: list[int]) -> Iterator[int]:
        return (place for place in places if not self.rows.constants.issuperset(self._nodes[place].outputs))

    def _closure(self, target: str) -> list[int]:
        """The nodes that make a cut value of other cut values and weights."""
        found: set[int] = set()
        waiting = [target]
        while waiting:
            place = self.rows.maker.get(waiting.pop())
            if place is not None and place not in found:
                found.add(place)
                waiting += [name for name in self._nodes[place].inputs if name not in self._cuts]
        return sorted(found)

    def _reads(self, target: str, places: list[int]) -> tuple[dict[tuple[int, int], Read], set[str]]:
        """What each node reads of cut values, and values inside that two nodes read with different windows."""
        computed = list(self._computed(places))
        whole = not all(self.rows.is_local(self._nodes[place]) for place in computed)
        reads: dict[tuple[int, int], Read] = {}
        wanted: dict[str, Read] = {target: Read(target)}
        uneven: set[str] = set()
        for place in reversed(computed):
            node = self._nodes[place]
            made = next(wanted[name] for name in node.outputs if name in wanted)
            window = None if whole else self.rows.window(node)
            for index, name in enumerate(node.inputs):
                if not name or name in self.rows.constants:
                    continue
                read = Read(name, made.before, made.after, made.edge, made.masked)
                if window is not None:
                    masked = bool(window.before or window.after) and name not in self._cuts
                    read = Read(name, window.before, window.after, window.edge, masked)
                if name in self._cuts:
                    normed = node.kind == "GroupNormalization"
                    reads[place, index] = (
                        read if normed or not read.masked else Read(name, read.before, read.after)
                    )
                elif wanted.setdefault(name, read) != read:
                    uneven.add(name)
        return reads, uneven
