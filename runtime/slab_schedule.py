"""The passes over a volume that is worked on in slabs, whatever runs them.

A pass makes one operation's outputs slab by slab: it stores them, takes their statistics, or both. What they need and
is not stored is made anew in every slab, on the rows that something in the slab reads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, final


class Operation(Protocol):
    """Makes values of others; None stands for an input that is left out."""

    @property
    def inputs(self) -> tuple[str | None, ...]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...


class Norm(Protocol):
    """A norm that needs the statistics of the whole values `parts`, and `shift`, once."""

    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def shift(self) -> str | None: ...


class Slabbed(Protocol):
    """A program whose norms are taken apart."""

    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def operations(self) -> Sequence[Operation]: ...
    @property
    def norms(self) -> Sequence[Norm]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...
    def weights(self) -> frozenset[str]: ...


@final
@dataclass(frozen=True, kw_only=True)
class Pass:
    """Runs the operations `indices`, in order, and keeps outputs of the last; none: statistics of inputs only.

    `height`: rows of a slab; 0: everything at once. `stores`: outputs that are kept whole. `moments`: values whose
    statistics are taken. Then: `merges`, the norms that all statistics are known for; `forgets`, the statistics that
    no later norm needs; `frees`, the stored values that nothing reads later.
    """

    indices: tuple[int, ...]
    height: int
    stores: tuple[str, ...]
    moments: tuple[str, ...]
    merges: tuple[int, ...]
    forgets: tuple[str, ...]
    frees: tuple[str, ...]


def schedule(program: Slabbed, whole: Collection[int], stored: Collection[str]) -> list[Pass]:
    """The passes that store `stored`, every one at height 0. `whole`: operations that need whole inputs.

    The order is the program's: a pass reads what earlier ones stored, and norms whose statistics earlier ones took.
    """
    parts = {part for norm in program.norms for part in norm.parts}
    made = {name for operation in program.operations for name in operation.outputs}
    given = tuple(name for name in program.inputs if name in parts)
    found: list[tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]] = [((), (), given)] if given else []
    available: set[str] = set()
    for index, operation in enumerate(program.operations):
        stores = tuple(name for name in operation.outputs if name in stored)
        moments = tuple(name for name in operation.outputs if name in parts)
        if stores or moments or index in whole:
            found.append((chain(program.operations, index, made - available), stores, moments))
            available |= set(stores)
    taken: set[str] = set()
    there = set(program.inputs) | program.weights()
    merged_in: dict[int, int] = {}
    for place, (_, stores, moments) in enumerate(found):
        taken |= set(moments)
        there |= set(stores)
        for n, norm in enumerate(program.norms):
            if n not in merged_in and taken.issuperset(norm.parts) and norm.shift in {None, *there}:
                merged_in[n] = place
    forgotten = {part: place for n, place in sorted(merged_in.items(), key=lambda item: item[1])
                 for part in program.norms[n].parts}  # fmt: skip
    last = {name: place for place, (indices, stores, _) in enumerate(found)
            for name in (*stores, *(name for index in indices for name in program.operations[index].inputs))}  # fmt: skip
    last |= {program.norms[n].shift or "": max(place, last.get(program.norms[n].shift or "", 0))
             for n, place in merged_in.items()}  # fmt: skip
    kept = set(program.outputs)
    return [
        Pass(
            indices=indices, height=0, stores=stores, moments=moments,
            merges=tuple(n for n, at in merged_in.items() if at == place),
            forgets=tuple(part for part, at in forgotten.items() if at == place),
            frees=tuple(name for name, at in last.items() if at == place and name in available and name not in kept),
        )
        for place, (indices, stores, moments) in enumerate(found)
    ]  # fmt: skip


def chain(operations: Sequence[Operation], target: int, missing: Collection[str]) -> tuple[int, ...]:
    """The operations that a pass runs, in order: what the target needs of the values that are missing."""
    wanted = set(operations[target].outputs)
    found = []
    for index in range(target, -1, -1):
        if not wanted.isdisjoint(operations[index].outputs):
            found.append(index)
            wanted |= {name for name in operations[index].inputs if name is not None and name in missing}
    return tuple(reversed(found))


def heights(depth: int) -> list[int]:
    """The heights of a slab that are tried: the whole (0), then powers of two."""
    return [0, *(2**k for k in reversed(range((depth - 1).bit_length())))]
