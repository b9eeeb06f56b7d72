"""MONAI itself: its inferer, its DDIM scheduler, float32, eager or with torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, final

import numpy as np
import torch
from monai.inferers.inferer import DiffusionInferer, LatentDiffusionInferer
from numpy.typing import NDArray

from volcast.export.bundle import Bundle, read_bundle
from volcast.export.monai_run import monai_scheduler

from .contestant import Clock, Contestant, Part, Task


def read_matching(task: Task) -> Bundle:
    """The task's bundle, if it holds the weights that the artifact was exported from (ValueError otherwise)."""
    assert task.bundle is not None
    bundle = read_bundle(task.bundle)
    for role, digest in task.weights.items():
        if bundle.provenance.get(role) != digest:
            raise ValueError(
                f"[bench] {task.bundle}: its {role} is not the artifact's; give the bundle that it was exported from"
            )
    return bundle


def ddim(bundle: Bundle, steps: int) -> Any:
    """MONAI's DDIM scheduler for the bundle's network, whatever its own sampler is; its timesteps set."""
    spec = bundle.scheduler.model_copy(update={"scheduler": "ddim"})
    return monai_scheduler(spec, steps, bundle.latent_shape[1:])


@final
class MonaiContestant(Contestant):
    """`LatentDiffusionInferer.sample`, or `DiffusionInferer.sample` for a model without autoencoder.

    `compiled` puts the UNet and the decoder through torch.compile (Inductor, static shapes); the first volume pays.
    """

    def __init__(self, task: Task, *, compiled: bool = False) -> None:
        torch.set_num_threads(task.threads)
        bundle = read_matching(task)
        # Any: MONAI's annotations name fewer classes than its inferers take.
        self._unet, self._autoencoder = cast(Any, bundle.unet), cast(Any, bundle.autoencoder)
        self._scheduler = ddim(bundle, task.steps)
        self._scale_factor = bundle.scale_factor
        self._noise = torch.from_numpy(task.noise)
        context = task.conditions.get("context")
        self._context = None if context is None else torch.from_numpy(context[None])
        self._clock = Clock()
        # Set on the instances, so that the inferer's isinstance checks still see MONAI's classes.
        self._unet.forward = self._timed("network", self._unet.forward, compiled)
        if self._autoencoder is not None:
            decode = self._autoencoder.decode_stage_2_outputs
            self._autoencoder.decode_stage_2_outputs = self._timed("decode", decode, compiled)

    def volume(self, clock: Clock) -> NDArray[np.float32]:
        self._clock = clock
        given: dict[str, Any] = {"conditioning": self._context, "verbose": False}
        if self._autoencoder is None:
            inferer = DiffusionInferer(self._scheduler)
            image = inferer.sample(self._noise, self._unet, **given)
        else:
            latent = LatentDiffusionInferer(self._scheduler, scale_factor=self._scale_factor)
            image = latent.sample(self._noise, self._autoencoder, self._unet, **given)
        assert isinstance(image, torch.Tensor)
        array: NDArray[np.float32] = image[0].numpy()
        return array

    def _timed(self, part: Part, function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
        called = torch.compile(function, dynamic=False) if compiled else function

        def timed(*arguments: Any, **keywords: Any) -> Any:
            return self._clock.call(part, called, *arguments, **keywords)

        return timed
