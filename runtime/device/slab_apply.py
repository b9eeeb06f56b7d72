"""Runs single operations by the fused forms of the executor; on `meta` it allocates what it allocates on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .fused import FORMS, scratch_bytes
from .memory import Spec, empty
from .operations import evaluate
from .program import Operation


@final
class FusedApply:
    """`apply` of a slab plan. Knows the shapes of an operation's outputs once it has met those of its inputs."""

    def __init__(self) -> None:
        self._specs: dict[Any, list[Spec]] = {}

    def __call__(self, operation: Operation, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        device = next(x.device for x in inputs if x is not None)
        form = FORMS.get(operation.kind)
        if form is None:
            return evaluate(operation, inputs)
        outputs = [empty(spec, device) for spec in self._outputs(operation, inputs)]
        if device.type == "meta":
            torch.empty(scratch_bytes(operation, inputs, outputs), dtype=torch.uint8, device=device)
        else:
            form(operation, inputs, outputs)
        return outputs

    def _outputs(self, operation: Operation, inputs: Sequence[Tensor | None]) -> list[Spec]:
        key = (
            operation.outputs,
            str(operation.settings),
            *(x if x is None else tuple(x.shape) for x in inputs),
        )
        if key not in self._specs:
            with _disable_current_modes():  # what the definition allocates on `meta`, no GPU does
                results = evaluate(operation, [None if x is None else x.to("meta") for x in inputs])
            self._specs[key] = [(tuple(result.shape), result.dtype) for result in results]
        return self._specs[key]
