"""fuse_layout: what only rearranges a volume becomes a view of it, what only mixes its channels a product.

    reshape(transpose(volume)), transpose(reshape(volume))     tokens: channels lie last in memory, so nothing moves
    transpose(reshape(tokens)), reshape(transpose(tokens))     volume
    tokens(volume(x)), volume(tokens(x))                       x
    convolution of 1^n taps                                    linear on the volume

A `volume` takes its sizes from a tensor near by, so that none is kept from elsewhere for its sizes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import Tensor

from volcast.export.draft import Draft
from volcast.runtime.device.program import Operation

from .patterns import Shape, example_shapes

Shapes = Mapping[str, Shape]


def fuse_layout(draft: Draft) -> Draft:
    """No transpose between volumes and tokens is left, no convolution of one tap."""
    draft = _products(draft)
    shapes = example_shapes(draft)
    for view in (_tokens, _volume):
        draft = draft.edited([view(draft, shapes, one) or one for one in draft.operations])
    return _without_inverses(draft, shapes)


def renamed(draft: Draft, names: Mapping[str, str]) -> Draft:
    """The draft whose operations read `names[name]` instead of `name`; values that it returns keep their readers."""
    found = {name: source for name, source in names.items() if name not in draft.outputs}

    def source(name: str | None) -> str | None:
        while name in found:
            name = found[name]
        return name

    changed = [
        one.model_copy(update={"inputs": tuple(source(name) for name in one.inputs)})
        for one in draft.operations
    ]
    return draft.edited(changed)


def _products(draft: Draft) -> Draft:
    weights: dict[str, Tensor] = {}
    operations = []
    for one in draft.operations:
        if one.kind == "convolution" and _is_product(one, draft.weights[one.inputs[1] or ""]):
            name = f"{one.inputs[1]}.matrix"
            weights[name] = draft.weights[one.inputs[1] or ""].flatten(1).T.contiguous()
            inputs = (one.inputs[0], name, *one.inputs[2:])
            one = Operation(kind="linear", inputs=inputs, outputs=one.outputs)
        operations.append(one)
    return draft.edited(operations, weights)


def _is_product(one: Operation, weight: Tensor) -> bool:
    given = one.settings
    taps = weight.ndim >= 4 and prod(weight.shape[2:]) == 1 and given["groups"] == 1
    return taps and set(given["stride"]) == {1} and set(given["padding"]) == {0}


def _before(draft: Draft, one: Operation, kind: str) -> Operation | None:
    """What makes the operation's first input, if it is of this kind."""
    made = draft.producer.get(one.inputs[0] or "")
    return made if made is not None and made.kind == kind else None


def _pair(draft: Draft, one: Operation) -> tuple[Operation, list[int], bool] | None:
    """A transpose and a reshape in a row, the second being `one`: the first, the order, whether it transposes last."""
    if one.kind == "reshape":
        first = _before(draft, one, "transpose")
        return None if first is None else (first, list(first.settings["order"]), False)
    if one.kind == "transpose":
        first = _before(draft, one, "reshape")
        return None if first is None else (first, list(one.settings["order"]), True)
    return None


def _tokens(draft: Draft, shapes: Shapes, one: Operation) -> Operation | None:
    pair = _pair(draft, one)
    if pair is None:
        return None
    first, order, last = pair
    x, result = shapes[first.inputs[0] or ""], shapes[one.outputs[0]]
    made = draft.producer.get(first.inputs[0] or "")
    # What a rearrangement made is `N L heads D`, no volume.
    heads = made is not None and made.kind in ("reshape", "transpose")
    if heads or len(x) < 4 or result != (x[0], prod(x[2:]), x[1]):
        return None
    between = shapes[first.outputs[0]]
    turned = between == (x[0], x[1], prod(x[2:])) and order == [0, 2, 1]
    if turned if last else order == [0, *range(2, len(x)), 1]:
        return Operation(kind="tokens", inputs=first.inputs[:1], outputs=one.outputs)
    return None


def _volume(draft: Draft, shapes: Shapes, one: Operation) -> Operation | None:
    pair = _pair(draft, one)
    if pair is None:
        return None
    first, order, last = pair
    source = first.inputs[0] or ""
    x, result = shapes[source], shapes[one.outputs[0]]
    if len(x) != 3 or len(result) < 4 or (result[0], prod(result[2:]), result[1]) != x:
        return None
    between, rank = shapes[first.outputs[0]], len(result)
    turned = between == (x[0], *result[2:], x[2]) and order == [0, rank - 1, *range(1, rank - 1)]
    like = _like(draft, shapes, source, result[2:], (first if last else one).inputs[1:])
    if like is not None and (turned if last else order == [0, 2, 1]):
        return Operation(kind="volume", inputs=(source, like), outputs=one.outputs)
    return None


def _like(
    draft: Draft, shapes: Shapes, tokens: str, sizes: Shape, given: tuple[str | None, ...]
) -> str | None:
    """A volume of these sizes: the one that tokens before came from, before its products; else one of `given`."""

    def fits(name: str | None) -> bool:
        return name is not None and len(shapes[name]) == len(sizes) + 2 and shapes[name][2:] == sizes

    waiting, seen = [tokens], set[str]()
    while waiting:
        one = draft.producer.get(waiting.pop(0))
        if one is None or one.outputs[0] in seen:
            continue
        seen |= set(one.outputs)
        if one.kind == "tokens" and fits(one.inputs[0]):
            volume = one.inputs[0] or ""
            while volume in draft.producer and draft.producer[volume].kind == "linear":
                volume = draft.producer[volume].inputs[0] or ""
            return volume
        waiting += [name for name in one.inputs if name is not None]
    return next((name for name in given if fits(name)), None)


def _without_inverses(draft: Draft, shapes: Shapes) -> Draft:
    inverse: dict[str, str] = {"tokens": "volume", "volume": "tokens"}
    names: dict[str, str] = {}
    for one in draft.operations:
        first = _before(draft, one, inverse[one.kind]) if one.kind in inverse else None
        if first is not None and shapes[first.inputs[0] or ""] == shapes[one.outputs[0]]:
            names[one.outputs[0]] = first.inputs[0] or ""
    return renamed(draft, names)
