"""From the loop's latent to images on the host, on a stream of its own: the next batch's steps need not wait.

Samples are decoded one by one: an image's bits do not depend on its batch, and the memory is that of one.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volcast import _core
from volcast.runtime.spec import ArtifactSpec

from .executor import Executor
from .graphs import Function, Graphs
from .model import DeviceModel
from .slab_decode import SlabDecoder


@final
class Decoding:
    """One batch's way out. `hand_over` runs on the loop's stream, `finish` and `show` on `stream`.

    Attributes:
        image: float32 `[N, C, D, H, W]` on the host, page-locked on a GPU; what `finish` writes.
        preview: the same for `show`.
        bytes: the device memory of the decoder's own.
    """

    def __init__(
        self,
        spec: ArtifactSpec,
        model: DeviceModel,
        graphs: Graphs,
        loop_stream: _core.Stream,
        x: Tensor,
        counter: Tensor,
        memory: int | None,
    ) -> None:
        """`memory`: the bytes that decoding may take on the device; None: no limit.

        Raises ValueError where even the smallest slabs take more.
        """
        self.stream = graphs.stream()
        self._scale = spec.scale_factor
        self._x, self._counter = x, counter
        self._latent, self._shown = torch.empty_like(x), torch.empty_like(x)
        self._decode, image_shape, record = _decoder(spec, model, graphs, x, memory)
        n = x.shape[0]
        pinned = x.is_cuda
        self.image = torch.empty((n, *image_shape), pin_memory=pinned)
        self.preview = torch.empty((n, *image_shape), pin_memory=pinned)
        self._flags = torch.empty(counter.shape, dtype=counter.dtype, pin_memory=pinned)
        self.bytes = self._decode.bytes + 2 * x.nbytes

        def work(function: Function, stream: _core.Stream, recorded: bool) -> Any:
            return graphs.executable(graphs.record(function, stream)) if recorded else graphs.direct(function)

        self.hand_over = work(self._hand_over, loop_stream, True)
        self.snapshot = work(lambda: _copy(self._shown, self._x), loop_stream, True)
        self.finish = work(lambda: self._images(self._latent, self.image), self.stream, record)
        self.show = work(lambda: self._images(self._shown, self.preview), self.stream, record)

    def check(self, plan: _core.Plan, samples: NDArray[np.uint64]) -> None:
        """Raise ValueError where a value was not finite; call it when `finish` has run."""
        first = self._flags[2:].tolist()
        for sample, step in zip(samples.tolist(), first, strict=True):
            if step >= 0:
                raise ValueError(
                    f"[loop] step {step} (t={plan.rows[step]['t']:g}), sample {sample}: the network's output or x is "
                    "not finite; check the weights, the condition and the precision"
                )

    def _hand_over(self) -> None:
        self._latent.copy_(self._x)
        self._flags.copy_(self._counter, non_blocking=True)

    def _images(self, latent: Tensor, images: Tensor) -> None:
        for one, image in zip(latent.split(1), images.split(1), strict=True):
            image.copy_(self._decode(one / self._scale if self._decode.scaled else one), non_blocking=True)


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source)


@final
class _Whole:
    """The whole program at once, in one planned arena."""

    scaled = True

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.bytes = executor.plan.bytes

    def __call__(self, z: Tensor) -> Tensor:
        self._executor.inputs["z"].copy_(z)
        self._executor.run()
        return self._executor.outputs["image"].float()


@final
class _Slabs:
    """Slab by slab, with the statistics of the whole volume."""

    scaled = True

    def __init__(self, decoder: SlabDecoder, dtype: torch.dtype, peak: int) -> None:
        self._decoder, self._dtype = decoder, dtype
        self.bytes = peak

    def __call__(self, z: Tensor) -> Tensor:
        return self._decoder.run({"z": z.to(self._dtype)})["image"].float()


@final
class _Nothing:
    """A model without an autoencoder works on images."""

    scaled, bytes = False, 0

    def __call__(self, z: Tensor) -> Tensor:
        return z


def _decoder(
    spec: ArtifactSpec, model: DeviceModel, graphs: Graphs, x: Tensor, memory: int | None
) -> tuple[Any, tuple[int, ...], bool]:
    """(what decodes one sample, its image's shape, whether it can be recorded as a graph)."""
    if "decode" not in spec.programs:
        return _Nothing(), tuple(x.shape[1:]), True
    tensor = spec.programs["decode"].inputs[0]
    described = model.described({"z": (tensor, (1, *x.shape[1:]))})
    program, weights = model.program("decode"), model.weights("decode")
    raise NotImplementedError
