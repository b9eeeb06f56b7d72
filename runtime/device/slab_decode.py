"""Runs a program of volumes slab by slab, as planned: any size in little memory, with the whole volume's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from volcast.kernels.check import empty_channels_last
from volcast.runtime.slab_schedule import Pass

from .operations import dense, evaluate
from .slab_pass import Apply, SlabStep, Source, compute, slab_steps
from .slab_plan import SlabPlan
from .slabs import Rows, is_local
from .statistics import RowMoments, center_and_scale


@final
class SlabDecoder:
    """Runs one plan, as often as asked; a run leaves nothing behind."""

    def __init__(self, plan: SlabPlan, weights: Mapping[str, Tensor], apply: Apply = evaluate) -> None:
        """`weights` on the device that runs; `apply` as the plan was made for."""
        self._plan, self._weights, self._apply = plan, dict(weights), apply
        self._device = next(iter(self._weights.values())).device

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, whole, volumes channels last.

        Raises ValueError for an input that differs from the plan's.
        """
        return _Run(self._plan, self._weights, self._apply, self._checked(inputs), self._device).outputs()

    def _checked(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, (shape, dtype) in self._plan.inputs.items():
            x = inputs.get(name)
            if x is None or tuple(x.shape) != tuple(shape) or x.dtype != dtype:
                got = "is missing" if x is None else f"has shape {tuple(x.shape)} and dtype {x.dtype}"
                raise ValueError(
                    f"[decode] {name} {got}: need {tuple(shape)} and {dtype}; plan for what is given"
                )
        return {name: dense(inputs[name]) for name in self._plan.inputs}


@final
class _Run:
    """The state of one run: what is stored, and the statistics that are known."""

    def __init__(
        self, plan: SlabPlan, weights: Mapping[str, Tensor], apply: Apply, inputs: dict[str, Tensor],
        device: torch.device,
    ) -> None:  # fmt: skip
        self._plan, self._operations, self._apply, self._device = plan, plan.program.operations, apply, device
        self._values = {**weights, **inputs}
        self._moments: dict[str, RowMoments] = {}

    def outputs(self) -> dict[str, Tensor]:
        for one in self._plan.passes:
            self._pass(one)
            for index in one.merges:
                self._merge(index)
            for name in one.forgets:
                del self._moments[name]
            for name in one.frees:
                del self._values[name]
        return {name: self._values[name] for name in self._plan.program.outputs}

    def _pass(self, one: Pass) -> None:
        for name in one.moments:
            self._moments[name] = RowMoments(self._plan.shapes[name], self._device)
        if not one.indices:
            for name in one.moments:
                self._moments[name].add(self._values[name], 0)
        elif one.height:
            self._slabs(one)
        else:
            self._keep(one, self._whole_rows(one))

    def _whole_rows(self, one: Pass) -> Rows | None:
        operation = self._operations[one.indices[-1]]
        shapes = self._plan.shapes
        return (0, shapes[operation.outputs[0]][2]) if is_local(operation, shapes) else None

    def _keep(self, one: Pass, rows: Rows | None) -> None:
        """Everything at once: the outputs stay as they are."""
        made = self._slab(one, rows)
        for name in one.moments:
            self._moments[name].add(made[name][0], 0)
        self._values |= {name: made[name][0] for name in one.stores}

    def _slabs(self, one: Pass) -> None:
        for name in one.stores:
            like = torch.empty(0, dtype=self._plan.dtypes[name], device=self._device)
            self._values[name] = empty_channels_last(self._plan.shapes[name], like)
        depth = self._plan.shapes[self._operations[one.indices[-1]].outputs[0]][2]
        for start in range(0, depth, one.height):
            stop = min(start + one.height, depth)
            made = self._slab(one, (start, stop))
            for name in one.moments:
                self._moments[name].add(made[name][0], start)
            for name in one.stores:
                self._values[name].narrow(2, start, stop - start).copy_(made[name][0])
            del made  # before the next slab is made

    def _slab(self, one: Pass, rows: Rows | None) -> dict[str, Source]:
        """The outputs of the pass's last operation, on these rows."""
        made: dict[str, Source] = {}
        for step in slab_steps(self._operations, one.indices, self._plan.shapes, rows):
            made |= self._step(step, made)
            for name in step.release:
                del made[name]
        return made

    def _step(self, step: SlabStep, made: Mapping[str, Source]) -> dict[str, Source]:
        sources = [
            None if name is None else made[name] if name in made else (self._values[name], 0)
            for name in step.local.operation.inputs
        ]
        outputs = compute(self._apply, step, sources)
        first = 0 if step.rows is None else step.rows[0]
        names = step.local.operation.outputs
        return {name: (output, first) for name, output in zip(names, outputs, strict=True)}

    def _merge(self, index: int) -> None:
        norm = self._plan.program.norms[index]
        parts = [self._moments[part] for part in norm.parts]
        shift = None if norm.shift is None else self._values[norm.shift]
        weight = self._values[norm.weight]
        center, scale = center_and_scale(parts, shift, norm.groups, weight, norm.eps)
        self._values[norm.center], self._values[norm.scale] = center, scale
