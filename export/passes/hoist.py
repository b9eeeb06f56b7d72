"""hoist: cut a denoiser's graph by how often its parts change.

    schedule: timesteps  -> rows       once per schedule (time embedding and its projections)
    prepare:  conditions -> constants  once per request (cross-attention K and V or bias, class embedding, SPADE)
    step:     x, row, constants -> out once per step

The cut follows data flow alone: every operator goes to the least frequent program that knows all it reads; a size
that a program cannot see from its own inputs keeps the operator in `step`. What crosses the cut is packed, since
engines pay for every input: all of `schedule`'s tensors into one `rows` [steps, R], and `prepare`'s tensors of
fixed size into one `constants` [batch, M]; those with free spatial sizes stay apart as `constant_<k>`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from volcast.export.graph import aten, finish, inputs, is_free, is_size, outputs, shape_of, symbol

from .copier import Copier

SAMPLE, TIME = "x", "timesteps"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The three programs; `prepare` is None where nothing depends on the conditions alone."""

    schedule: GraphModule
    prepare: GraphModule | None
    step: GraphModule


def hoist(graph_module: GraphModule) -> Cut:
    """Cut a graph whose inputs are `x`, `timesteps` and any conditions; its one output is the network's.

    Raises ValueError where an input is missing or the output does not depend on x.
    """
    names = inputs(graph_module)
    for name in (SAMPLE, TIME):
        if name not in names:
            raise ValueError(f"[hoist] the graph has inputs {sorted(names)}: it needs {name!r}")
    conditions = frozenset(names) - {SAMPLE, TIME}
    rates = _rates(graph_module, conditions)
    (result,) = outputs(graph_module)
    if rates.get(result) != "step":
        raise ValueError("[hoist] the output does not depend on x: nothing to sample")
    batch = symbol(shape_of(names[SAMPLE])[0])
    while True:
        crossing = _crossing(graph_module, rates)
        # A row must follow its sample: what has no batch axis in front (heads merged into it, say) waits for the step.
        stuck = [
            node
            for node in (*crossing["schedule"], *crossing["prepare"])
            if not shape_of(node) or symbol(shape_of(node)[0]) != batch
        ]
        if not stuck:
            break
        if names[TIME] in stuck:
            raise ValueError(
                "[hoist] timesteps and x do not share their batch: the rows could not follow the samples"
            )
        rates |= dict.fromkeys(stuck, "step")
    schedule = _extract(graph_module, (TIME,), crossing["schedule"], "rows")
    used = [name for name in names if name in conditions]
    prepare = _extract(graph_module, used, crossing["prepare"], "constants") if crossing["prepare"] else None
    return Cut(schedule=schedule, prepare=prepare, step=_step(graph_module, rates, crossing))


def _crossing(graph_module: GraphModule, rates: dict[Node, str]) -> dict[str, list[Node]]:
    """The tensors of `schedule` and `prepare` that `step` reads."""
    crossing: dict[str, list[Node]] = {"schedule": [], "prepare": []}
    for node in graph_module.graph.nodes:
        tensor = node.op == "call_function" and not isinstance(node.meta.get("val"), list | tuple)
        timesteps = node.op == "placeholder" and node.target == TIME
        read = any(rates.get(user) == "step" for user in node.users)
        if (tensor or timesteps) and rates.get(node) in crossing and read:
            crossing[rates[node]].append(node)
    return crossing


def _rates(graph_module: GraphModule, conditions: frozenset[str]) -> dict[Node, str]:
    """`schedule`, `prepare` or `step` for every tensor that depends on an input."""
    known = {"schedule": _symbols(graph_module, (TIME,)), "prepare": _symbols(graph_module, conditions)}
    rates: dict[Node, str] = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
            rates[node] = "step" if name == SAMPLE else "schedule" if name == TIME else "prepare"
        elif node.op == "call_function" and not is_size(node):
            sources = {rates[source] for source in node.all_input_nodes if source in rates}
            rate = next(iter(sources)) if len(sources) == 1 else "step"
            if rate != "step" and not _size_symbols(node) <= known[rate]:
                rate = "step"
            rates[node] = rate
    return rates


def _symbols(graph_module: GraphModule, names: Sequence[str] | frozenset[str]) -> set[str]:
    placeholders = inputs(graph_module)
    sizes: list[Any] = [size for name in names for size in shape_of(placeholders[name]) if is_free(size)]
    return {str(s) for size in sizes for s in size.node.expr.free_symbols}


def _size_symbols(node: Node) -> set[str]:
    """The free symbols of the sizes a node takes as arguments."""
    sizes = [source.meta["val"] for source in node.all_input_nodes if is_size(source)]
    return {str(s) for size in sizes if is_free(size) for s in size.node.expr.free_symbols}


def _is_packable(node: Node) -> bool:
    fixed = all(isinstance(size, int) for size in shape_of(node)[1:])
    return fixed and node.meta["val"].dtype == torch.float32


def _layout(node: Node) -> tuple[int, int] | None:
    """(rank, axis) of a tensor [batch, 1, .., C, .., 1]: such tensors are packed along C without a reshape each."""
    wide = [axis for axis, size in enumerate(shape_of(node)) if axis and size != 1]
    return (len(shape_of(node)), wide[0]) if len(wide) == 1 else None


def _groups(nodes: Sequence[Node]) -> list[tuple[tuple[int, int] | None, list[Node]]]:
    """Packable tensors by layout, in the order of the packed columns."""
    grouped: dict[tuple[int, int] | None, list[Node]] = {}
    for node in nodes:
        if _is_packable(node):
            grouped.setdefault(_layout(node), []).append(node)
    return list(grouped.items())


def _columns(node: Node) -> int:
    return prod(int(size) for size in shape_of(node)[1:])


def _extract(source: GraphModule, names: Sequence[str], crossing: Sequence[Node], packed: str) -> GraphModule:
    """The program from `names` to what crosses: first the packed tensor, then the rest in order."""
    copier = Copier(source, names)
    flat = [
        copier.call(aten.reshape.default, (copier.copy(node), [-1, _columns(node)]))
        for _, group in _groups(crossing)
        for node in group
    ]
    results = [copier.call(aten.cat.default, (flat, 1))] if flat else []
    results += [copier.copy(node) for node in crossing if not _is_packable(node)]
    if packed == "rows" and len(results) != 1:
        raise ValueError("[hoist] a tensor of the schedule depends on a size: only fixed sizes fit a table")
    copier.graph.output(tuple(results))
    return finish(GraphModule(source, copier.graph))


def _unpack(copier: Copier, packed: Node, nodes: Sequence[Node]) -> None:
    """Give `copier` every packable tensor back, as slices of the packed one."""
    groups = _groups(nodes)
    widths = [sum(_columns(node) for node in group) for _, group in groups]
    parts = _split(copier, packed, widths, 1)
    for (layout, group), part, width in zip(groups, parts, widths, strict=True):
        columns = [_columns(node) for node in group]
        axis = 1
        if layout is not None:
            rank, axis = layout
            shape = [-1, *[1] * (rank - 1)]
            shape[axis] = width
            part = part if rank == 2 else copier.call(aten.reshape.default, (part, shape))
        for node, piece in zip(group, _split(copier, part, columns, axis), strict=True):
            if layout is None:
                piece = copier.call(aten.reshape.default, (piece, [-1, *shape_of(node)[1:]]))
            copier.copies[node] = piece


def _split(copier: Copier, node: Node, widths: Sequence[int], axis: int) -> list[Node]:
    if len(widths) == 1:
        return [node]
    split = copier.call(aten.split_with_sizes.default, (node, list(widths), axis))
    return [copier.call(operator.getitem, (split, index)) for index in range(len(widths))]


def _step(source: GraphModule, rates: dict[Node, str], crossing: dict[str, list[Node]]) -> GraphModule:
    copier = Copier(source, (SAMPLE,), {node for node, rate in rates.items() if rate == "step"})
    placeholders = inputs(source)
    example: Tensor = placeholders[SAMPLE].meta["val"]
    packed: list[tuple[Node, list[Node]]] = []
    for rate, name in (("schedule", "row"), ("prepare", "constants")):
        nodes = [node for node in crossing[rate] if _is_packable(node)]
        if nodes:
            place = copier.graph.placeholder(name)
            width = sum(_columns(node) for node in nodes)
            place.meta["val"] = example.new_empty((example.shape[0], width), dtype=torch.float32)
            packed.append((place, nodes))
    loose = [node for node in crossing["prepare"] if not _is_packable(node)]
    for index, node in enumerate(loose):
        copier.add_input(f"constant_{index}", node)
    for name, node in placeholders.items():
        if name not in (SAMPLE, TIME) and any(rates.get(user) == "step" for user in node.users):
            copier.add_input(name, node)
    for place, nodes in packed:
        _unpack(copier, place, nodes)
    (result,) = outputs(source)
    copier.graph.output((copier.copy(result),))
    return finish(GraphModule(source, copier.graph))
