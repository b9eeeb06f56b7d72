"""In which order the operations of a device program run, so that little memory is alive at once.

Any order in which values are made before they are read gives the same bits. From the given one on, the operations that
could relieve the fullest moment are moved, as long as that helps: the readers of a value that waits there go ahead of it
(a residual block's product with its input runs first, and the norm may overwrite the input), the maker of one goes behind
it. A local search: to find the best order is NP-hard (Sethi, SIAM J. Comput. 4, 1975).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import final

from .memory import MemoryPlan, Spec, aligned, plan, read_values, size_of, takeovers, views
from .program import DeviceProgram

Order = list[int]
"""Operations, by their places in the program as it was given."""


def plan_order(
    program: DeviceProgram, specs: Mapping[str, Spec], keep: frozenset[str] = frozenset()
) -> tuple[DeviceProgram, MemoryPlan]:
    """The program in the order to run it in, and `memory.plan` of that: as it was given, unless another's arena is smaller.

    The same program and sizes give the same order.
    """
    given = plan(program, specs, keep)
    order = Orders(program, specs, keep).best()
    moved = program.model_copy(update={"operations": tuple(program.operations[index] for index in order)})
    found = plan(moved, specs, keep)
    return (moved, found) if found.bytes < given.bytes else (program, given)


@final
class Orders:
    """A program's values and operations as numbers: an order is judged in one walk."""

    def __init__(self, program: DeviceProgram, specs: Mapping[str, Spec], keep: frozenset[str]) -> None:
        operations, within = program.operations, views(program)
        made = [*program.inputs, *(name for one in operations for name in one.outputs)]
        number = {name: i for i, name in enumerate(name for name in made if name not in within)}
        maker = {name: index for index, one in enumerate(operations) for name in one.outputs}

        def values(names: Iterable[str]) -> list[int]:
            bases = dict.fromkeys(within.get(name, name) for name in names)
            return [number[name] for name in bases if name in number]  # no weights

        self._bytes = [aligned(size_of(specs[name])) for name in number]
        self._inputs = values(program.inputs)
        self._lasting = set(values([*keep, *program.outputs]))
        self._reads = [values(read_values(program, one)) for one in operations]
        self._makes = [values(name for name in one.outputs if name not in within) for one in operations]
        self._takes = [list(map(values, takeovers(one, specs, within).values())) for one in operations]
        # What only gives a size has to be there as well.
        self._needs = [{maker[name] for name in one.inputs if name in maker} for one in operations]

    def best(self) -> Order:
        """The last of the orders that were each better than the one before: less at once, or as much less often."""
        order = list(range(len(self._reads)))
        least = self._judged(order)
        while True:
            tried = [(self._judged(one), number, one) for number, one in enumerate(self._moves(order))]
            found, _, better = min(tried, default=(least, 0, order))
            if found >= least:
                return order
            least, order = found, better

    def profile(self, order: Order) -> list[int]:
        """The bytes that are alive during each operation, as `memory.plan` would have it."""
        last, size = self._last(order), self._bytes
        alive = sum(size[value] for value in self._inputs if last[value] >= 0)
        found = []
        for place, index in enumerate(order):
            ending = [value for value in self._reads[index] if last[value] == place]
            taken = set[int]()
            for sources in self._takes[index]:
                taken |= set([value for value in sources if value in ending and value not in taken][:1])
            alive += sum(size[value] for value in self._makes[index]) - sum(size[value] for value in taken)
            found.append(alive)
            alive -= sum(size[value] for value in ending if value not in taken)
            alive -= sum(size[value] for value in self._makes[index] if last[value] < 0)
        return found

    def _judged(self, order: Order) -> tuple[int, int]:
        """(the most bytes alive at once, during how many operations)."""
        profile = self.profile(order)
        most = max(profile, default=0)
        return most, profile.count(most)

    def _last(self, order: Order) -> list[int]:
        """Of each value the place of its last reader: -1 where nothing reads it, past the end where it is kept."""
        last = [-1] * len(self._bytes)
        for place, index in enumerate(order):
            for value in self._reads[index]:
                last[value] = place
        for value in self._lasting:
            last[value] = len(order)
        return last

    def _moves(self, order: Order) -> Iterator[Order]:
        """Orders in which a value that waits during the (first) fullest moment does not."""
        profile, last = self.profile(order), self._last(order)
        if not profile:
            return
        full = profile.index(max(profile))
        at = {index: place for place, index in enumerate(order)}
        ahead = self._needed(order[: full + 1], {order[full]})
        waiting = [(-1, value) for value in self._inputs]
        waiting += [(index, value) for index in order[:full] for value in self._makes[index]]
        for maker, value in waiting:
            if last[value] <= full:
                continue
            readers = {index for index in order[full + 1 :] if value in self._reads[index]}
            moved = self._needed(order[full:], readers)
            if value not in self._lasting and order[full] not in moved:
                sources = {source for index in moved for source in self._needs[index]} - moved
                earliest = 1 + max((at[source] for source in sources), default=-1)
                yield from (_moved(order, moved, place) for place in sorted({earliest, full}))
            if maker >= 0 and maker not in ahead:
                branch = self._needed(order[:full], {maker}) - ahead
                for late in [{maker}, branch] if len(branch) > 1 else [branch]:
                    moved = self._following(order[:full], late)
                    users = [at[index] for index in order[full:] if self._needs[index] & moved]
                    latest = min(users, default=len(order))
                    yield from (_moved(order, moved, place) for place in sorted({full + 1, latest}))

    def _needed(self, order: Order, wanted: set[int]) -> set[int]:
        """`wanted`, and those of `order` that they need."""
        found, known = set(wanted), set(order)
        for index in reversed(order):
            if index in found:
                found |= self._needs[index] & known
        return found

    def _following(self, order: Order, moved: set[int]) -> set[int]:
        """`moved`, and those of `order` that need them."""
        found = set(moved)
        for index in order:
            if self._needs[index] & found:
                found.add(index)
        return found


def _moved(order: Order, moved: set[int], place: int) -> Order:
    """`order` with `moved` in front of the operation that stands at `place`."""
    before = [index for index in order[:place] if index not in moved]
    after = [index for index in order[place:] if index not in moved]
    return before + [index for index in order if index in moved] + after
