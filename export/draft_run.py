"""Runs a draft eagerly, operation by operation: how a pass is checked."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from volcast.runtime.device.operations import dense, evaluate
from volcast.runtime.device.program import VIEWS

from .draft import Draft


def run_draft(draft: Draft, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of a draft, on the inputs' device (`meta` for shapes alone), in the layout that programs have."""
    values: dict[str, Tensor] = {}
    for name in draft.inputs:
        offset = draft.offsets.get(name)
        values[name] = dense(
            inputs[name] if offset is None else inputs[name] + draft.weights[offset].to(inputs[name].device)
        )
    last = {
        name: place for place, one in enumerate(draft.operations) for name in one.inputs if name is not None
    }
    device = next(iter(values.values())).device
    for place, one in enumerate(draft.operations):
        read = [
            None if name is None else values[name] if name in values else draft.weights[name].to(device)
            for name in one.inputs
        ]
        made = evaluate(one, read)
        values |= zip(one.outputs, made if one.kind in VIEWS else map(dense, made), strict=True)
        for used in {name for name in one.inputs if name is not None and last[name] == place}:
            if used not in draft.outputs:
                values.pop(used, None)
    return [values[name] for name in draft.outputs]
