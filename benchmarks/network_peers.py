"""Ways to run a model on one device: MONAI as a user would run it, and MONAI as torch.compile makes it.

Every way prepares calls on buffers of its own; what is timed is the prepared call.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiGroupNorm3D
from monai.inferers.inferer import LatentDiffusionInferer
from torch import Tensor, nn

from volcast.export.bundle import Bundle
from volcast.export.monai_run import monai_scheduler
from volcast.export.networks import Denoiser, plain_modules

Call = Callable[[], Tensor]
Form = Literal["eager", "autocast", "graph", "max-autotune"]
PEERS: dict[str, Form] = {
    "MONAI eager": "eager",
    "MONAI autocast": "autocast",
    "torch.compile, CUDA graph": "graph",
    "torch.compile max-autotune": "max-autotune",
}
"""By name. eager: float32 as shipped, TF32 in convolutions as PyTorch has it; autocast: the same under float16 autocast;
graph: float16, channels last, compiled in the default mode and captured whole; max-autotune: with that mode's own graphs."""
TIMESTEP = 500.0


@final
@dataclass(frozen=True, kw_only=True)
class Given:
    """What all are given, on the CPU. x: noise, float32 `[N, C, D, H, W]`; conditions `[N, ...]` in forward's order."""

    x: Tensor
    conditions: Mapping[str, Tensor]


class Way(ABC):
    """One way to run one model."""

    name: str
    weight_bytes: int

    @abstractmethod
    def step(self, given: Given) -> Call:
        """The network at x and timestep `TIMESTEP`."""

    @abstractmethod
    def decode(self, given: Given) -> Call:
        """The image of the first sample of x as a latent."""

    @abstractmethod
    def volume(self, given: Given, steps: int) -> Call:
        """Images `[N, C, D, H, W]` on the CPU after so many DDIM steps from x."""


@final
class MonaiWay(Way):
    """MONAI's networks and inferer in one form."""

    def __init__(self, name: str, bundle: Bundle, device: torch.device) -> None:
        self.name = name
        self._form = PEERS[name]
        self._device = device
        self._half = self._form in ("graph", "max-autotune")
        self._bundle = bundle
        self._network = self._moved(Denoiser(bundle.unet, [one.name for one in bundle.conditions]))
        assert bundle.autoencoder is not None, "all cases have one"
        autoencoder = self._moved(bundle.autoencoder)
        self._decode = cast(Callable[[Tensor], Tensor], autoencoder.decode)
        parameters = [*self._network.parameters(), *autoencoder.parameters()]
        self.weight_bytes = sum(value.numel() * value.itemsize for value in parameters)

    def step(self, given: Given) -> Call:
        return self._prepared(self._network, self._buffers(given))

    def decode(self, given: Given) -> Call:
        return self._prepared(self._decode, [self._input(given.x[:1])])

    def volume(self, given: Given, steps: int) -> Call:
        buffers, z = self._buffers(given), self._input(given.x[:1])
        network, decode = self._prepared(self._network, buffers), self._prepared(self._decode, [z])
        scheduler = monai_scheduler(self._bundle.scheduler, steps, tuple(given.x.shape[2:]))
        inferer = LatentDiffusionInferer(scheduler, scale_factor=self._bundle.scale_factor)
        noise = given.x.to(self._device)

        def denoised(x: Tensor, timesteps: Tensor, context: None) -> Tensor:
            buffers[0].copy_(x)
            buffers[1].copy_(timesteps)
            return network().float()

        def image(latent: Tensor) -> Tensor:
            z.copy_(latent)
            return decode().float()

        decoder: Any = _Decoder(image)
        unet: Any = denoised
        return lambda: inferer.sample(noise, decoder, unet, verbose=False).cpu()  # type: ignore[union-attr]

    def _moved(self, network: nn.Module) -> nn.Module:
        moved = network.to(self._device)
        if self._form == "eager":
            return moved
        if self._form == "autocast":
            moved = copy.deepcopy(moved)
            for module in moved.modules():
                if isinstance(module, MaisiGroupNorm3D):
                    module.norm_float16 = True  # as published; outside of autocast MONAI cannot run it
            return moved
        half: Any = plain_modules(moved).half()
        return cast(nn.Module, half.to(memory_format=torch.channels_last_3d))

    def _input(self, value: Tensor) -> Tensor:
        """A buffer in the way's dtype and layout; whole numbers stay so."""
        if not value.is_floating_point():
            return value.to(self._device)
        if not self._half:
            return value.to(self._device, copy=True)
        kept = value.to(self._device, torch.float16, copy=True)
        return kept.contiguous(memory_format=torch.channels_last_3d) if kept.ndim == 5 else kept

    def _buffers(self, given: Given) -> list[Tensor]:
        timesteps = torch.full((len(given.x),), TIMESTEP, device=self._device)
        return [self._input(given.x), timesteps, *(self._input(value) for value in given.conditions.values())]

    def _prepared(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Call:
        """A call of `function` on `inputs`, which may be written to between calls; compiled and captured now."""
        if self._form == "autocast":

            def narrowed() -> Tensor:
                with torch.no_grad(), torch.autocast(self._device.type, torch.float16):
                    return function(*inputs)

            return narrowed
        if self._form == "graph":
            return _captured(torch.compile(function, dynamic=False), inputs)
        best = torch.compile(function, dynamic=False, mode="max-autotune") if self._half else None

        def called() -> Tensor:
            with torch.no_grad():
                if best is None:
                    return function(*inputs)
                # Its graphs' outputs may be overwritten by the next call.
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                return best(*inputs)

        return called


def _captured(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Call:
    """`function` recorded as a CUDA graph; its result is the same memory after every call."""
    with torch.no_grad():
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            for _ in range(3):
                function(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(*inputs)

    def replayed() -> Tensor:
        graph.replay()
        return result

    return replayed


@final
class _Decoder:
    """What the inferer takes for an autoencoder; samples one by one, as volcast decodes."""

    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        self._decode = decode

    def decode_stage_2_outputs(self, z: Tensor) -> Tensor:
        return torch.cat([self._decode(one).clone() for one in torch.split(z, 1)])
