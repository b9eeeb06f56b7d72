"""fuse_pointwise: what elementwise operations remain become few launches.

Two operations of one shape, of which the second reads the first, become one that runs the steps of both; a middle
value that others read too is one more result, so nothing is computed twice. They stay two where another operation
lies between them, and past the contract's inputs, results or 24 steps. Then

    f(conv(x) + bias, ..)     the bias is added by f, as an operand `[C]`, where only f reads the convolution's output
    x @ W + other             the sum is the product's `residual`, where the product has no bias (left)

The same numbers; the bias is added in float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, final

from volcast.export.draft import Draft
from volcast.kernels.pointwise_program import MOST_RESULTS
from volcast.runtime.device.program import Operation

from .fold_bias import BIAS, bias_of
from .patterns import Shape, depends_on, example_shapes, is_strided, sum_of, with_inputs

MOST_INPUTS, MOST_STEPS = 6, 24
NUMBERS = {"constant": 0, "clamp": 1, "leaky_relu": 1}
"""How many registers precede the numbers of a step that has numbers."""


@final
@dataclass(frozen=True)
class _Program:
    """Steps over `inputs`, whose registers come first; `results` are values and their registers."""

    inputs: tuple[str, ...]
    steps: tuple[tuple[Any, ...], ...]
    results: dict[str, int]

    @staticmethod
    def of(one: Operation) -> _Program:
        steps = tuple(tuple(step) for step in json.loads(one.settings["program"]))
        inputs = tuple(name for name in one.inputs if name is not None)
        return _Program(inputs, steps, dict(zip(one.outputs, one.settings["results"], strict=True)))

    def operation(self) -> Operation:
        settings = {"program": json.dumps(self.steps), "results": list(self.results.values())}
        return Operation(kind="pointwise", inputs=self.inputs, outputs=tuple(self.results), settings=settings)

    def placed(self, registers: list[int]) -> list[tuple[Any, ...]]:
        """The steps, where `registers` says for each register of this program which one it is in another."""
        return [
            (name, *(registers[v] if i < NUMBERS.get(name, len(rest)) else v for i, v in enumerate(rest)))
            for name, *rest in self.steps
        ]

    def then(self, second: _Program, kept: set[str]) -> _Program:
        """Both programs as one, with the results `kept` of the first and all of the second."""
        inputs = tuple(dict.fromkeys([*self.inputs, *(n for n in second.inputs if n not in self.results)]))
        at = {name: place for place, name in enumerate(inputs)}
        count = len(inputs)
        before = [at[name] for name in self.inputs] + [count + i for i in range(len(self.steps))]
        made = {name: before[register] for name, register in self.results.items()}
        start = count + len(self.steps)
        after = [made[name] if name in made else at[name] for name in second.inputs]
        after += [start + i for i in range(len(second.steps))]
        results = {name: register for name, register in made.items() if name in kept}
        results |= {name: after[register] for name, register in second.results.items()}
        return _Program(inputs, (*self.placed(before), *second.placed(after)), results)

    def fits(self) -> bool:
        return (
            len(self.inputs) <= MOST_INPUTS
            and len(self.steps) <= MOST_STEPS
            and len(self.results) <= MOST_RESULTS
        )


def fuse_pointwise(draft: Draft) -> Draft:
    """Every pair that can be one operation, then biases, then sums with products."""
    shapes = example_shapes(draft)
    for name in [one.outputs[-1] for one in draft.operations if one.kind == "pointwise"]:
        joined: Draft | None = draft
        while joined is not None:
            draft, joined = joined, _joined(joined, name, shapes)
    for name in [one.outputs[-1] for one in draft.operations if one.kind == "pointwise"]:
        draft = _with_biases(draft, draft.producer[name], shapes)
        draft = _with_product(draft, draft.producer[name], shapes)
    return draft


def _joined(draft: Draft, name: str, shapes: dict[str, Shape]) -> Draft | None:
    """The operation that makes `name` joined with one that it reads; None where there is none to join."""
    second = draft.producer[name]
    for value in second.inputs:
        first = draft.producer.get(value or "")
        if first is None or first.kind != "pointwise" or shapes[first.outputs[0]] != shapes[name]:
            continue
        others = [source for source in second.inputs if source is not None and source not in first.outputs]
        if any(depends_on(draft, source, made) for source in others for made in first.outputs):
            continue
        read = {source for one in draft.operations if one != second for source in one.inputs}
        kept = {made for made in first.outputs if made in draft.outputs or made in read}
        program = _Program.of(first).then(_Program.of(second), kept)
        if program.fits():
            operations = [program.operation() if one == second else one for one in draft.operations]
            return draft.edited(one for one in operations if one != first)
    return None


def _with_biases(draft: Draft, one: Operation, shapes: dict[str, Shape]) -> Draft:
    """The biases of what only `one` reads, in full size, become its operands."""
    for name in one.inputs:
        source = draft.producer.get(name or "")
        if source is None or name is None or draft.only_consumer(name) != one:
            continue
        bias = bias_of(source, shapes)
        if bias is None or shapes[name] != shapes[one.outputs[0]]:
            continue
        added = _Program((f"{name}.raw", bias), (("add", 0, 1),), {name: 2})
        program = added.then(_Program.of(one), set())
        if not program.fits():
            continue
        program = _Program(tuple(name if n == f"{name}.raw" else n for n in program.inputs), program.steps, program.results)  # fmt: skip
        bare = with_inputs(source, [None if place == BIAS else n for place, n in enumerate(source.inputs)])
        made = program.operation()
        replaced = {source.outputs[0]: bare, one.outputs[0]: made}
        draft = draft.edited(replaced.get(other.outputs[0], other) for other in draft.operations)
        one = made
    return draft


def _with_product(draft: Draft, one: Operation, shapes: dict[str, Shape]) -> Draft:
    """A sum with a product of which nothing else is read, neither with bias nor residual yet."""
    added = sum_of(one)
    for product, other in (added, added[::-1]) if added is not None else ():
        source = draft.producer.get(product)
        if source is None or source.kind != "linear" or any(source.inputs[BIAS:]):
            continue
        whole = shapes[product] == shapes[other] == shapes[one.outputs[0]] and other not in draft.weights
        if product == other or not whole or draft.only_consumer(product) != one or is_strided(draft, other):
            continue
        inputs = (*source.inputs[:BIAS], None, other)
        made = Operation(kind="linear", inputs=inputs, outputs=one.outputs)
        return draft.edited(made if place == one else place for place in draft.operations if place != source)
    return draft
