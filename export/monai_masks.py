"""What MONAI's networks are shown of a request's label maps and hints, and its ControlNets as its inferer calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .bundle import Bundle
from .networks import MASK, SCALE, control_arguments, resized_hint

Array = NDArray[np.generic]


@final
class Shown:
    """The label maps and hints of a request.

    Attributes:
        names: the conditions that these are.
        segmentation: `[N, C, D, H, W]` for SPADE networks; None without.
        hints: `[N, C, D, H, W]` of each ControlNet; `scales` `[N, controls]` multiplies their residuals.
    """

    def __init__(self, bundle: Bundle, values: Mapping[str, Array]) -> None:
        hints = [control.hint for control in bundle.controls]
        self.names = {*bundle.encodings, *hints, *([SCALE] if hints else [])}
        self.hints = [_channels(bundle, name, values[name]) for name in hints]
        self.scales = torch.from_numpy(np.asarray(values[SCALE])) if hints else torch.empty(0)
        spade = MASK in bundle.encodings and MASK not in hints
        self.segmentation = _channels(bundle, MASK, values[MASK]) if spade else None


def _channels(bundle: Bundle, name: str, value: Array) -> Tensor:
    """A label map as one channel a label, or MAISI's one a bit; anything else as it is."""
    tensor = torch.from_numpy(np.ascontiguousarray(value))
    if name not in bundle.encodings:
        return tensor
    labels, channels = bundle.encodings[name].shape
    if labels == channels:
        last = functional.one_hot(tensor, channels)
    else:
        last = tensor.unsqueeze(-1).bitwise_and(2 ** torch.arange(channels)).ne(0)
    return last.movedim(-1, 1).float()


@final
class Controls:
    """Every ControlNet of a bundle as one, as `ControlNetDiffusionInferer` calls it: their residuals added up.

    `bound`: what the inferer has no argument for (class labels, one context beside another), doubled for guidance.
    """

    def __init__(self, bundle: Bundle, shown: Shown, bound: Mapping[str, Tensor]) -> None:
        self._controls = bundle.controls
        self._shown = shown
        self._bound = bound

    def __call__(
        self, x: Tensor, timesteps: Tensor, controlnet_cond: Tensor, context: Tensor | None = None
    ) -> Any:
        """The down residuals and the middle one. `controlnet_cond` is the first hint, doubled for guidance."""
        branches = len(x) // len(self._shown.scales)
        if "concat" in self._bound:
            x = torch.cat((x, self._bound["concat"]), dim=1)
        given = dict(self._bound) | ({} if context is None else {"context": context})
        down: list[Tensor] = []
        middle = torch.zeros(())
        for index, control in enumerate(self._controls):
            hint = self._shown.hints[index].repeat(branches, *[1] * (x.ndim - 1))
            assert index or torch.equal(hint, controlnet_cond)
            found, last = control.network(
                x=x,
                timesteps=timesteps.expand(len(x)),
                controlnet_cond=resized_hint(control.network, hint, x),
                conditioning_scale=self._shown.scales[:, index]
                .repeat(branches)
                .reshape(-1, *[1] * (x.ndim - 1)),
                **control_arguments(control.network, given),
            )
            down = [a + b for a, b in zip(down, found, strict=True)] if down else found
            middle = middle + last
        return down, middle
