"""fuse_norm: a norm takes in what stands before and behind it.

    y = silu(norm(v))                                    activation, where nothing else reads norm(v)
    v = cat([h, second], channels)                       GroupNorm, where only norms and 1^n products read v
    h = x + shift + residual                             any order of additions whose middle sums nothing else reads

x and residual have h's shape, shift is one number a channel (and sample). h is the norm's second output, which all
other readers of the sum then read; GroupNorm writes it with a residual only, so a sum with a shift alone that is read
elsewhere stays. Of the norms that read one sum the first computes it. The same numbers, added in another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from volcast.export.draft import Draft
from volcast.runtime.device.program import Operation

from .patterns import (
    Shape,
    concat_parts,
    depends_on,
    example_shapes,
    is_strided,
    is_vector,
    reads_at,
    silu_of,
    sum_of,
    with_inputs,
)

NORMS = ("group_norm", "layer_norm")
WEIGHT, BIAS, SHIFT, RESIDUAL, SECOND = 1, 2, 3, 4, 5
"""Places of a norm's inputs."""


def fuse_norm(draft: Draft) -> Draft:
    """Every norm with its activation, concatenation and sum."""
    shapes = example_shapes(draft)
    for name in [one.outputs[0] for one in draft.operations if one.kind in NORMS]:
        draft, name = _activation(draft, name)
        draft = _concat(draft, name, shapes)
        draft = _sum(draft, name, shapes)
    return draft


def norm_inputs(norm: Operation) -> list[str | None]:
    """x, weight, bias, shift, residual, second: None where left out."""
    return [*norm.inputs, *(None,) * (6 - len(norm.inputs))]


def _activation(draft: Draft, name: str) -> tuple[Draft, str]:
    norm = draft.producer[name]
    activated = silu_of(draft, name)
    if norm.kind != "group_norm" or norm.settings["activation"] != "none" or activated is None:
        return draft, name
    settings = norm.settings | {"activation": "silu"}
    fused = norm.model_copy(update={"outputs": (activated, *norm.outputs[1:]), "settings": settings})
    operations = [fused if one == norm else one for one in draft.operations if activated not in one.outputs]
    return draft.edited(operations), activated


def _concat(draft: Draft, name: str, shapes: dict[str, Shape]) -> Draft:
    norm = draft.producer[name]
    inputs = norm_inputs(norm)
    whole = inputs[0]
    assert whole is not None
    parts = concat_parts(draft, whole, shapes)
    if norm.kind != "group_norm" or parts is None or any(inputs[SHIFT:]):
        return draft
    kinds = ("group_norm", "linear")
    apart = all(one.kind in kinds and reads_at(one, whole) == [0] for one in draft.consumers[whole])
    if not apart or any(is_strided(draft, part) or part in draft.weights for part in parts):
        return draft
    inputs[0], inputs[SECOND] = parts
    fused = with_inputs(norm, inputs)
    return draft.edited(fused if one == norm else one for one in draft.operations)


@final
@dataclass(frozen=True)
class _Terms:
    full: tuple[str, ...]
    vectors: tuple[str, ...]

    def fits(self) -> bool:
        return 1 <= len(self.full) <= 2 and len(self.vectors) <= 1


def _terms(total: str, added: tuple[str, str], draft: Draft, shapes: dict[str, Shape]) -> _Terms | None:
    """The two operands of a sum; None where one is neither of its shape nor spread over it."""
    shape = shapes[total]
    # A weight is never the residual: it would have to be written out.
    full = tuple(name for name in added if shapes[name] == shape and name not in draft.weights)
    vectors = tuple(name for name in added if is_vector(shapes[name], shape))
    return _Terms(full, vectors) if len(full) + len(vectors) == 2 else None


def _sum_terms(total: str, draft: Draft, shapes: dict[str, Shape]) -> _Terms | None:
    """What a value is the sum of: middle sums are opened as long as the norm can take all terms."""
    parent = draft.producer.get(total)
    added = sum_of(parent)
    found = _terms(total, added, draft, shapes) if added is not None else None
    if found is None or not found.fits():
        return None
    opened = True
    while opened:
        opened = False
        for middle in found.full:
            inner = sum_of(draft.producer.get(middle))
            reader = draft.only_consumer(middle)
            terms = _terms(middle, inner, draft, shapes) if inner is not None and reader is not None else None
            if terms is None:
                continue
            rest = tuple(name for name in found.full if name != middle)
            wider = _Terms(rest + terms.full, found.vectors + terms.vectors)
            if wider.fits():
                found, opened = wider, True
                break
    return found


def _sum(draft: Draft, name: str, shapes: dict[str, Shape]) -> Draft:
    norm = draft.producer[name]
    inputs = norm_inputs(norm)
    total = inputs[0]
    assert total is not None
    terms = _sum_terms(total, draft, shapes)
    if (
        terms is None
        or inputs[SHIFT]
        or inputs[RESIDUAL]
        or any(is_strided(draft, one) for one in terms.full)
    ):
        return draft
    alone = draft.only_consumer(total) == norm and reads_at(norm, total) == [0]
    if norm.kind == "group_norm" and len(terms.full) == 1 and not alone:
        return draft  # it would not write the sum
    second = inputs[SECOND]
    if second is not None and depends_on(draft, second, total):
        return draft  # what reads the sum would have to run before the norm that writes it
    order = {made: place for place, one in enumerate(draft.operations) for made in one.outputs}
    latest = sorted(terms.full, key=lambda made: -order.get(made, -1))
    inputs[0], inputs[RESIDUAL] = latest[0], latest[1] if len(latest) > 1 else None
    inputs[SHIFT] = terms.vectors[0] if terms.vectors else None
    written = norm.kind == "layer_norm" or inputs[RESIDUAL] is not None
    fused = with_inputs(norm, inputs, (name, total) if written else (name,))
    operations = [fused if one == norm else one for one in draft.operations if total not in one.outputs]
    return draft.edited(operations)
