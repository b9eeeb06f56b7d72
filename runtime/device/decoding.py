"""From the loop's latent to images on the host, on a stream of its own: the next batch's steps need not wait."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volcast import _core
from volcast.runtime.spec import ArtifactSpec

from . import memory, slab_simulation
from .executor import Executor, besides, usual_impl
from .graphs import Function, Graphs
from .model import DeviceModel
from .operations import evaluate
from .order import plan_order
from .slab_decode import SlabDecoder
from .slab_plan import plan_slabs
from .step_loop import StepLoop


class Decoder(ABC):
    """Makes the image of one sample.

    Attributes:
        bytes: the device memory that it takes.
        recorded: whether its work can be a graph: it allocates nothing.
        shape: of an image, `C D H W`.
    """

    bytes: int
    recorded: bool
    shape: tuple[int, ...]

    @abstractmethod
    def __call__(self, latent: Tensor) -> Tensor:
        """The image `[1, C, D, H, W]`, float32, of one latent as the loop leaves it."""


@final
class Whole(Decoder):
    """The whole program at once, in one planned arena, the image that leaves the device with it."""

    recorded = True

    def __init__(self, executor: Executor, scale: float) -> None:
        """`executor`: with an arena as large as `image_place` says."""
        self._executor, self._scale = executor, scale
        spec = executor.specs["image"]
        place, arena = image_place(executor.plan, spec)
        self._image = memory.place(executor.arena, place, (spec[0], torch.float32))
        self.shape = spec[0][1:]
        self.bytes = arena + besides(executor.program, executor.weights, executor.specs, executor.impl)

    def __call__(self, latent: Tensor) -> Tensor:
        self._executor.inputs["z"].copy_(latent / self._scale)
        self._executor.run()
        image = self._executor.outputs["image"]
        if image.dtype != torch.float32:
            self._image.copy_(image)
        return self._image


def image_place(plan: memory.MemoryPlan, image: memory.Spec) -> tuple[int, int]:
    """(where the image in float32 begins, bytes of an arena that holds it too). When the program has run, nothing else
    than its image is alive: the float32 one lies before it, or behind it."""
    shape, dtype = image
    begin = plan.offsets["image"]
    if dtype == torch.float32:
        return begin, plan.bytes
    size = memory.size_of((shape, torch.float32))
    place = 0 if size <= begin else memory.aligned(begin + memory.size_of(image))
    return place, max(plan.bytes, place + size)


@final
class Slabs(Decoder):
    """Slab by slab, with the statistics of the whole volume."""

    recorded = False

    def __init__(
        self, decoder: SlabDecoder, dtype: torch.dtype, image: memory.Spec, peak: int, scale: float
    ) -> None:
        self._decoder, self._dtype, self._scale = decoder, dtype, scale
        self.shape = image[0][1:]
        self.bytes = peak + 4 * math.prod(image[0])

    def __call__(self, latent: Tensor) -> Tensor:
        return self._decoder.run({"z": (latent / self._scale).to(self._dtype)})["image"].float()


@final
class Nothing(Decoder):
    """A model without an autoencoder works on images."""

    recorded, bytes = True, 0

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __call__(self, latent: Tensor) -> Tensor:
        return latent


def open_decoder(
    spec: ArtifactSpec, model: DeviceModel, latent: tuple[int, ...], limit: int | None
) -> Decoder:
    """The fastest decoder of a latent `C D H W` that takes at most `limit` bytes besides the weights; None: no limit.

    A volume with a tensor of 2^31 elements or more is decoded in slabs: cuBLAS and PyTorch's resize count in 32 bits.
    Raises ValueError, with the least that would do, where even the smallest slabs take more.
    """
    if "decode" not in spec.programs:
        return Nothing(latent)
    described = model.described({"z": (spec.programs["decode"].inputs[0], (1, *latent))})
    program, weights = model.program("decode"), model.weights("decode")
    model.check("decode", described)
    specs = memory.shapes(program, weights, described)
    image = specs["image"]
    _, whole = image_place(plan_order(program, specs)[1], image)
    fits = limit is None or whole + besides(program, weights, specs, usual_impl(model.device)) <= limit
    if fits and max(math.prod(shape) for shape, _ in specs.values()) < slab_simulation.MOST_ELEMENTS:
        arena = torch.empty(whole, dtype=torch.uint8, device=model.device)
        return Whole(Executor(program, weights, described, model.device, arena), spec.scale_factor)
    apply = evaluate
    if model.device.type == "cuda":
        from .slab_apply import FusedApply

        apply = FusedApply()
    held = sum(x.nbytes for x in weights.values())
    room = 2**63 if limit is None else limit - 4 * math.prod(image[0]) + held
    plan = plan_slabs(program, weights, described, room, apply)
    decoder = SlabDecoder(plan, weights, apply)
    return Slabs(decoder, model.dtype, image, plan.peak_bytes - held, spec.scale_factor)


@final
class Decoding:
    """One batch's way out. `hand_over` and `snapshot` run on the loop's stream, `finish` and `show` on `stream`.

    Let go of it when both are idle.

    Attributes:
        image: float32 `[N, C, D, H, W]` on the host, page-locked for a GPU; what `finish` writes.
        preview: the same for `show`.
        bytes: the device memory of the decoder's own.
        previews: whether `show` can run beside the loop; slabs allocate and cannot.
    """

    def __init__(self, graphs: Graphs, loop: StepLoop, decoder: Decoder, stream: _core.Stream) -> None:
        x, counter = loop.x, loop.counter
        latent, shown = torch.empty_like(x), torch.empty_like(x)
        self.stream = stream
        self.bytes = decoder.bytes + 2 * x.nbytes
        self.previews = decoder.recorded
        shape = (x.shape[0], *decoder.shape)
        image, preview = graphs.host_memory(shape), graphs.host_memory(shape)
        flags = graphs.host_memory(tuple(counter.shape), counter.dtype)
        self.image, self.preview, self._flags = image, preview, flags
        self._graphs: list[Any] = []

        def recorded(function: Function, stream: _core.Stream) -> _core.Executable:
            self._graphs.append(graphs.record(function, stream))  # its kernels' memory lives as long as it
            return graphs.executable(self._graphs[-1])

        def images(latent: Tensor, to: Tensor) -> None:
            # One by one: an image's bits do not depend on its batch, and the memory is that of one.
            for sample in range(len(to)):
                to[sample].copy_(decoder(latent[sample : sample + 1])[0], non_blocking=True)

        def hand_over() -> None:
            latent.copy_(x)
            flags.copy_(counter, non_blocking=True)

        # The functions, which the graphs keep, hold tensors and not `self`: no cycle keeps them longer than it.
        self.hand_over = recorded(hand_over, loop.stream)
        self.snapshot = recorded(lambda: _copy(shown, x), loop.stream)
        work = recorded if decoder.recorded else lambda function, _: graphs.direct(function)
        self.finish: Any = work(lambda: images(latent, image), stream)
        self.show: Any = work(lambda: images(shown, preview), stream)

    def check(self, plan: _core.Plan, samples: NDArray[np.uint64]) -> None:
        """Raise ValueError where a value was not finite; call it when `finish` has run."""
        for sample, step in zip(samples.tolist(), self._flags[2:].tolist(), strict=True):
            if step >= 0:
                raise ValueError(
                    f"[loop] step {step} (t={plan.rows[step]['t']:g}), sample {sample}: the network's output or x is "
                    "not finite; check the weights, the condition and the precision"
                )


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source)
