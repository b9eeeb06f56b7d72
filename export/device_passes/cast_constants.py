"""cast_constants: what comes from the row or the request's constants alone is float32; where it meets volumes or tokens
in an operation of one type, it gets theirs.

    attention(q, k, v), k and v from `constants`     `constants` cast once, k and v taken from the cast

So it is with the keys and values of cross-attention over several tokens, which `prepare` makes. Ranges, reshapes and
transposes between are repeated after the cast: one launch whatever their number. In float32 the same numbers.
"""

from __future__ import annotations

from volcast.export.draft import Draft
from volcast.runtime.device.program import Operation

from .patterns import SHAPE_ONLY, with_inputs

KEEPING = {"columns", "concat", "expand", "linear", "pointwise", "reshape", "transpose"}
"""Kinds whose output has the type of their inputs."""
MOVING = {"columns", "expand", "reshape", "transpose"}
"""Those of them that only move numbers, so that a cast may as well come before."""
ONE_TYPE = {"attention", "concat", "einsum", "matmul"}
"""Kinds that refuse values of different types."""


def float32_values(draft: Draft) -> set[str]:
    """Vectors that the CPU computed, and what is computed from them alone."""
    wide = {name for name in draft.inputs if len(draft.shapes[name]) <= 2}
    for one in draft.operations:
        if one.kind in KEEPING and all(name in wide for name in _values(draft, one)):
            wide |= set(one.outputs)
    return wide


def cast_constants(draft: Draft) -> Draft:
    """Each operation of one type that reads float32 values beside others reads casts of them."""
    wide = float32_values(draft)
    like = next((name for name in draft.inputs if name not in wide), None)
    if like is None:
        return draft
    casts: dict[str, Operation] = {}

    def cast(name: str) -> str:
        made = f"{name}.cast"
        if made not in casts:
            source = draft.producer.get(name)
            if source is not None and source.kind in MOVING:
                read = [cast(source.inputs[0] or ""), *source.inputs[1:]]
                casts[made] = with_inputs(source, read, (made,))
            else:
                casts[made] = Operation(kind="cast", inputs=(name, like), outputs=(made,))
        return made

    changed = []
    for one in draft.operations:
        values = _values(draft, one)
        if one.kind in ONE_TYPE and not wide.isdisjoint(values) and not wide.issuperset(values):
            read = [cast(name) if name in wide else name for name in one.inputs if name is not None]
            one = with_inputs(one, read)
        changed.append(one)
    return draft.edited([*casts.values(), *changed])


def _values(draft: Draft, one: Operation) -> list[str]:
    """The inputs whose numbers it reads, weights left out."""
    read = one.inputs[: SHAPE_ONLY.get(one.kind)]
    return [name for name in read if name is not None and name not in draft.weights]
