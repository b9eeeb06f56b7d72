"""fuse_attention: softmax(q k^T scale) v becomes one operation on tokens, its projections one product.

    einsum or matmul, numbers times the scores, softmax, einsum or matmul     attention on `N L H*D`
    transposes and reshapes that take each other back                         nothing
    products of the same tokens or vectors (q, k, v; the blocks' embeddings)  one product of the weights side by side

Heads are split off and merged where attention reads and writes, so the rearrangements around it cancel. What reaches
attention by another way (keys that `prepare` made) is rearranged once more instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from volcast.export.draft import Draft
from volcast.kernels.attention import WIDEST
from volcast.runtime.device.program import Operation

from .fuse_layout import renamed
from .patterns import Shape, example_shapes

HEADS_FIRST = [0, 2, 1, 3]


def fuse_attention(draft: Draft) -> Draft:
    """Every attention whose heads are a fixed number, of a width that the operation takes."""
    shapes = example_shapes(draft)
    changed: list[Operation] = []
    for one in draft.operations:
        found = _match(draft, one, shapes)
        heads = None if found is None or not found.fits(shapes) else _heads(draft, found.q, shapes)
        changed += [one] if found is None or heads is None else found.operations(one, heads, shapes)
    return _side_by_side(_without_inverses(draft.edited(changed)))


@final
@dataclass(frozen=True)
class _Match:
    """The operands `N (H) L D`; keys of a matmul are already transposed, unless it undoes that itself."""

    q: str
    k: str
    v: str
    scale: float
    turned: bool

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """What `kernels.attention` asks of its operands."""
        q, k, v = shapes[self.q], shapes[self.k], shapes[self.v]
        k = (*k[:-2], k[-1], k[-2]) if self.turned else k
        width = q[-1]
        return (*q[:-2], v[-2], width) == k == v and width % 8 == 0 and width <= WIDEST and self.scale > 0

    def operations(self, one: Operation, heads: int, shapes: Mapping[str, Shape]) -> list[Operation]:
        """Those that make what `one`, the product with v, made."""
        name, width = one.outputs[0], shapes[self.v][-1]
        made: list[Operation] = []
        operands = []
        for role, source in (("q", self.q), ("k", self.k), ("v", self.v)):
            turned = role == "k" and self.turned
            if heads == 0:
                order = [0, 2, 1] if turned else None
            else:
                order = [0, 3, 1, 2] if turned else HEADS_FIRST
            if order is not None:
                source = _append(made, "transpose", source, f"{name}.{role}.rows", order=order)
            if heads:
                channels = heads * (width if role == "v" else shapes[self.q][-1])
                source = _append(made, "reshape", source, f"{name}.{role}.tokens", sizes=[0, 0, channels])
            operands.append(source)
        tokens = f"{name}.tokens" if heads else name
        settings = {"heads": heads or 1, "scale": self.scale}
        made.append(Operation(kind="attention", inputs=tuple(operands), outputs=(tokens,), settings=settings))
        if heads:
            split = _append(made, "reshape", tokens, f"{name}.heads", sizes=[0, 0, heads, width])
            _append(made, "transpose", split, name, order=HEADS_FIRST)
        return made


def _append(made: list[Operation], kind: str, source: str, name: str, **settings: list[int]) -> str:
    made.append(Operation.model_validate(
        {"kind": kind, "inputs": (source,), "outputs": (name,), "settings": settings}
    ))  # fmt: skip
    return name


def _match(draft: Draft, one: Operation, shapes: Mapping[str, Shape]) -> _Match | None:
    """The attention whose last product is `one`."""
    weights = _operands(one, "scores")
    soft = draft.producer.get(weights[0]) if weights is not None else None
    if weights is None or soft is None or soft.kind != "softmax":
        return None
    if soft.settings["axis"] != len(shapes[weights[0]]) - 1:
        return None
    scores, scale = _scaled(draft, soft.inputs[0] or "")
    product = draft.producer.get(scores)
    operands = _operands(product, "keys") if product is not None else None
    if product is None or operands is None:
        return None
    (q, before), (k, key_scale) = (_scaled(draft, name) for name in operands)
    turned = product.kind == "matmul"
    made = draft.producer.get(k)
    if turned and made is not None and made.kind == "transpose":
        order = list(made.settings["order"])
        if order == [*range(len(order) - 2), len(order) - 1, len(order) - 2]:
            k, more = _scaled(draft, made.inputs[0] or "")
            key_scale, turned = key_scale * more, False
    return _Match(q, k, weights[1], scale * before * key_scale, turned)


def _operands(one: Operation, right: str) -> tuple[str, str] | None:
    """The factors of a product of the last two axes; an einsum's second may be `keys`, transposed, or `scores`."""
    if one.kind not in ("matmul", "einsum") or len(one.inputs) != 2:
        return None
    if one.kind == "einsum":
        terms, result = one.settings["equation"].split("->")
        first, second = terms.split(",")
        batch, row, common = first[:-2], first[-2], first[-1]
        other = second[-2] if right == "keys" else second[-1]
        wanted = f"{batch}{other}{common}" if right == "keys" else f"{batch}{common}{other}"
        if second != wanted or result != f"{batch}{row}{other}" or len({*first, other}) != len(first) + 1:
            return None
    return one.inputs[0] or "", one.inputs[1] or ""


def _scaled(draft: Draft, name: str) -> tuple[str, float]:
    """What a value was before it was multiplied by numbers, and their product."""
    factor = 1.0
    while (one := draft.producer.get(name)) is not None and one.kind == "pointwise" and len(one.inputs) == 1:
        match json.loads(one.settings["program"]):
            case [["constant", number], ["mul", 0, 1] | ["mul", 1, 0]]:
                factor *= number
            case [["constant", number], ["div", 0, 1]]:
                factor /= number
            case _:
                break
        name = one.inputs[0] or ""
    return name, factor


def _heads(draft: Draft, q: str, shapes: Mapping[str, Shape]) -> int | None:
    """The fixed number of heads that a reshape split off; 0 for tokens, None where the axis is none of heads."""
    if len(shapes[q]) == 3:
        return 0
    turn = draft.producer.get(q)
    if turn is None or turn.kind != "transpose" or list(turn.settings["order"]) != HEADS_FIRST:
        return None
    split = draft.producer.get(turn.inputs[0] or "")
    heads = split.settings["sizes"][2] if split is not None and split.kind == "reshape" else None
    return heads if isinstance(heads, int) and heads > 0 else None


def _without_inverses(draft: Draft) -> Draft:
    """Transposes in a row become one, or none; a reshape to the shape from before a reshape goes."""
    shapes = example_shapes(draft)
    while True:
        names: dict[str, str] = {}
        for one in draft.operations:
            made = draft.producer.get(one.inputs[0] or "")
            if made is None or made.kind != one.kind:
                continue
            back = one.kind == "transpose" and [
                made.settings["order"][axis] for axis in one.settings["order"]
            ]
            same = one.kind == "reshape" and shapes[one.outputs[0]] == shapes[made.inputs[0] or ""]
            if same or back == list(range(len(back or []))) and back:
                names[one.outputs[0]] = made.inputs[0] or ""
        names = {name: source for name, source in names.items() if name not in draft.outputs}
        if not names:
            return draft
        draft = renamed(draft, names)


def _side_by_side(draft: Draft) -> Draft:
    """Products of one x, which attention or, of vectors, elementwise operations read."""
    shapes = example_shapes(draft)
    groups: dict[str, list[Operation]] = {}
    for one in draft.operations:
        readers = {reader.kind for name in one.outputs for reader in draft.consumers.get(name, ())}
        wanted = (
            "pointwise" if one.kind == "linear" and len(shapes[one.inputs[0] or ""]) == 2 else "attention"
        )
        mergeable = one.kind == "linear" and len(one.inputs) <= 3 and one.inputs[1] in draft.weights
        if mergeable and readers == {wanted} and one.outputs[0] not in draft.outputs:
            groups.setdefault(one.inputs[0] or "", []).append(one)
    weights: dict[str, Tensor] = {}
    replaced: dict[str, list[Operation]] = {}
    for x, group in groups.items():
        if len(group) > 1:
            merged = _merged(draft, x, sorted(group, key=lambda one: _role(draft, one)), weights)
            replaced |= {one.outputs[0]: [] for one in group}
            replaced[group[0].outputs[0]] = merged
    return draft.edited(
        [new for one in draft.operations for new in replaced.get(one.outputs[0], [one])], weights
    )


def _role(draft: Draft, one: Operation) -> int:
    """q, k, v in the order in which attention takes them."""
    reader = draft.consumers[one.outputs[0]][0]
    return reader.inputs.index(one.outputs[0]) if reader.kind == "attention" else 0


def _merged(draft: Draft, x: str, group: Sequence[Operation], weights: dict[str, Tensor]) -> list[Operation]:
    name = f"{group[0].outputs[0]}.all"
    matrices = [draft.weights[one.inputs[1] or ""] for one in group]
    biases = [draft.weights[one.inputs[2] or ""] if len(one.inputs) > 2 else None for one in group]
    weights[f"{name}.weight"] = torch.cat(matrices, 1)
    inputs = [x, f"{name}.weight"]
    if any(bias is not None for bias in biases):
        zeros = [
            torch.zeros(matrix.shape[1]) if bias is None else bias
            for bias, matrix in zip(biases, matrices, strict=True)
        ]
        weights[f"{name}.bias"] = torch.cat(zeros)
        inputs.append(f"{name}.bias")
    made = [Operation(kind="linear", inputs=tuple(inputs), outputs=(name,))]
    start = 0
    for one, matrix in zip(group, matrices, strict=True):
        stop = start + matrix.shape[1]
        settings = {"start": start, "stop": stop}
        made.append(Operation(kind="columns", inputs=(name,), outputs=one.outputs, settings=settings))
        start = stop
    return made
