"""A device program while passes work on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import final

from torch import Tensor

from volcast.runtime.device.program import DeviceProgram, Operation


@final
@dataclass(frozen=True)
class Draft:
    """A program and its weights, float32. A pass gives back another; weights are shared, never changed in place.

    Operations stand in the order in which they run. `offsets`: input -> weight to add to it (see `DeviceProgram`).
    `shapes`: of the inputs, None where a size is free; passes read from them which operands are spread over others.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    weights: Mapping[str, Tensor]
    offsets: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)

    @cached_property
    def producer(self) -> dict[str, Operation]:
        """The operation that makes a value."""
        return {name: operation for operation in self.operations for name in operation.outputs}

    @cached_property
    def consumers(self) -> dict[str, tuple[Operation, ...]]:
        """The operations that read a value or weight, each once; the program's outputs have none for that."""
        found: dict[str, list[Operation]] = {}
        for operation in self.operations:
            for name in dict.fromkeys(operation.inputs):
                if name is not None:
                    found.setdefault(name, []).append(operation)
        return {name: tuple(operations) for name, operations in found.items()}

    def only_consumer(self, name: str) -> Operation | None:
        """The one operation that reads a value; None where several do, none does, or the program returns it."""
        readers = self.consumers.get(name, ())
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def edited(
        self,
        operations: Iterable[Operation],
        weights: Mapping[str, Tensor] | None = None,
        offsets: Mapping[str, str] | None = None,
    ) -> Draft:
        """The draft with these operations (put in an order that runs, what nothing reads dropped) and added weights."""
        known = {**self.weights, **(weights or {})}
        kept = _alive(_sorted(tuple(operations), {*self.inputs, *known}), self.outputs)
        where = dict(self.offsets if offsets is None else offsets)
        read = {name for one in kept for name in one.inputs if name is not None} | set(where.values())
        return replace(
            self, operations=kept, weights={k: v for k, v in known.items() if k in read}, offsets=where
        )

    def program(self) -> DeviceProgram:
        return DeviceProgram(
            inputs=self.inputs, outputs=self.outputs, operations=self.operations, offsets=dict(self.offsets)
        )


def _sorted(operations: tuple[Operation, ...], known: set[str]) -> tuple[Operation, ...]:
    """Each operation after what makes its inputs, otherwise in the given order."""
    makers = {name: one for one in operations for name in one.outputs}
    done, result = set(known), []
    for first in operations:
        stack = [first]
        while stack:
            one = stack[-1]
            missing = [name for name in one.inputs if name is not None and name not in done]
            if all(name in done for name in one.outputs):
                stack.pop()
            elif missing:
                if any(name not in makers or makers[name] in stack for name in missing):
                    raise ValueError(
                        f"[build] {one.kind} {one.outputs[0]} reads {missing[0]}, which nothing makes"
                    )
                stack.extend(makers[name] for name in missing)
            else:
                done |= set(one.outputs)
                result.append(stack.pop())
    return tuple(result)


def _alive(operations: tuple[Operation, ...], outputs: tuple[str, ...]) -> tuple[Operation, ...]:
    wanted, kept = set(outputs), []
    for one in reversed(operations):
        if wanted & set(one.outputs):
            wanted |= {name for name in one.inputs if name is not None}
            kept.append(one)
    return tuple(reversed(kept))
