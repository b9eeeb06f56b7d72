"""MONAI's own code running a bundle: its networks in float32, its scheduler, its inferer. The reference of `verify`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.inferers.inferer import ControlNetDiffusionInferer, DiffusionInferer, LatentDiffusionInferer
from monai.networks.nets.spade_autoencoderkl import SPADEAutoencoderKL
from monai.networks.nets.spade_diffusion_model_unet import SPADEDiffusionModelUNet
from monai.networks.schedulers.ddim import DDIMScheduler
from monai.networks.schedulers.ddpm import DDPMScheduler
from monai.networks.schedulers.pndm import PNDMScheduler
from monai.networks.schedulers.rectified_flow import RFlowScheduler
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from volcast.runtime.spec import LOW_RES, TAU, SchedulerSpec

from .bundle import Bundle
from .monai_masks import Controls, Shown
from .text_encoder import TEXT

Array = NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class NetworkCall:
    """One call of the UNet: timestep, x `[N, C, D, H, W]`, and its output for each branch of guidance."""

    t: float
    x: Array
    conditional: Array
    unconditional: Array | None


@dataclass(frozen=True, kw_only=True)
class MonaiRun:
    """What a run of MONAI saw.

    `timesteps` are those that the network was shown, in order; `calls` the kept ones by their index. `z`
    `[N, C, D', H', W']` is what the autoencoder decoded (divided by the scale factor) to `image` `[N, C, D, H, W]`;
    in pixel space both are the result.
    """

    timesteps: tuple[float, ...]
    calls: Mapping[int, NetworkCall]
    z: Array
    image: Array


def run_monai(
    bundle: Bundle,
    noise: Callable[[int], Array],
    conditional: Mapping[str, Array],
    *,
    steps: int,
    guidance: float | None = None,
    unconditional: Mapping[str, Array] | None = None,
    keep: Collection[int] = (),
    on_step: Callable[[int], object] = lambda done: None,
) -> MonaiRun:
    """Sample `bundle` with MONAI 1.6.1: (Latent)DiffusionInferer over the bundle's scheduler, with ControlNets
    ControlNetDiffusionInferer and then the autoencoder.

    Args:
        noise: `noise(0)` is the initial noise `[N, C, D', H', W']`, `noise(i + 1)` what a stochastic step i adds.
        conditional: `[N, ...]` by name. A lone `context` or `concat` goes through the inferer's `conditioning`; what
            the inferer has no argument for (class labels, several conditions) is bound to the network it is given.
        guidance: classifier-free guidance (the inferer's `cfg`), with `unconditional` values of the same shapes.
        keep: indices of the network calls to keep.
        on_step: called after each network call with the calls done.
    """
    start = torch.from_numpy(np.ascontiguousarray(noise(0)))
    scheduler = monai_scheduler(bundle.scheduler, steps, tuple(start.shape[2:]))
    conditional = _monai_names(bundle, conditional)
    unconditional = None if unconditional is None else _monai_names(bundle, unconditional)
    shown = Shown(bundle, conditional)
    own = {name: value for name, value in conditional.items() if name not in shown.names}
    other = None if unconditional is None else {name: unconditional[name] for name in own}
    network = _Observed(bundle.unet, start.shape[1], own, other, shown.segmentation, keep, on_step)
    arguments: dict[str, Any] = {"scheduler": scheduler, "verbose": False, "cfg": guidance}
    lone = network.lone
    if lone is not None:
        arguments["conditioning"] = torch.from_numpy(np.ascontiguousarray(conditional[lone]))
        arguments["mode"] = "concat" if lone == "concat" else "crossattn"
        if unconditional is not None:
            arguments["cfg_fill_value"] = float(unconditional[lone].flat[0])
    inferer: Any
    with _Noise(noise):
        if bundle.controls:
            # MONAI's latent inferer would shrink the hints to the latent's size, which the trained networks do not take.
            inferer = ControlNetDiffusionInferer(scheduler)
            controls = Controls(bundle, shown, network.bound)
            z = inferer.sample(start, network, controls, shown.hints[0], **arguments)
        elif bundle.autoencoder is None:
            inferer = DiffusionInferer(scheduler)
            z = inferer.sample(start, network, **arguments)
        else:
            decoder = _ObservedDecoder(bundle.autoencoder, shown.segmentation)
            inferer = LatentDiffusionInferer(scheduler, scale_factor=bundle.scale_factor)
            image = inferer.sample(start, decoder, network, **arguments)
            z = decoder.z
    if bundle.autoencoder is None:
        image = z
    elif bundle.controls:
        z = z / bundle.scale_factor
        with torch.no_grad():
            image = _ObservedDecoder(bundle.autoencoder, shown.segmentation).decode_stage_2_outputs(z)
    return MonaiRun(timesteps=tuple(network.timesteps), calls=network.calls, z=_array(z), image=_array(image))


def _monai_names(bundle: Bundle, values: Mapping[str, Array]) -> dict[str, Array]:
    """An upscaler's conditions by the names that they have in MONAI; the level goes nowhere without class labels."""
    if bundle.text_encoder is not None:
        with torch.no_grad():
            context = _array(bundle.text_encoder(torch.from_numpy(values[TEXT])))
        values = {name: value for name, value in values.items() if name != TEXT} | {"context": context}
    told = getattr(bundle.unet, "num_class_embeds", None) is not None
    names = {LOW_RES: "concat", TAU: "class_labels"}
    return {names.get(name, name): value for name, value in values.items() if told or name != TAU}


def monai_scheduler(spec: SchedulerSpec, steps: int, latent_spatial: tuple[int, ...]) -> Any:
    """MONAI's scheduler for `spec`, its timesteps set. Raises ValueError for one that MONAI does not have."""
    schedule = spec.noise_schedule
    train = schedule.num_train_timesteps
    if spec.scheduler == "rflow":
        flow = RFlowScheduler(
            num_train_timesteps=train,
            use_discrete_timesteps=spec.use_discrete_timesteps,
            use_timestep_transform=spec.use_timestep_transform,
            steps_offset=spec.steps_offset,
            base_img_size_numel=spec.base_img_size_numel,
            spatial_dim=len(latent_spatial),
        )
        flow.set_timesteps(steps, input_img_size_numel=int(np.prod(latent_spatial)))
        return flow
    own: dict[str, dict[str, Any]] = {
        "linear_beta": {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end},
        "scaled_linear_beta": {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end},
        "sigmoid_beta": {
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "sig_range": schedule.sig_range,
        },
        "cosine": {"s": schedule.s},
    }
    arguments: dict[str, Any] = {
        "num_train_timesteps": train,
        "schedule": schedule.schedule,
        "prediction_type": spec.prediction_type,
        **own[schedule.schedule],
    }
    clip: dict[str, Any] = {
        "clip_sample": spec.clip_sample,
        "clip_sample_min": spec.clip_sample_min,
        "clip_sample_max": spec.clip_sample_max,
    }
    last: dict[str, Any] = {"set_alpha_to_one": spec.set_alpha_to_one, "steps_offset": spec.steps_offset}
    scheduler: Any
    match spec.scheduler:
        case "ddim":
            scheduler = DDIMScheduler(**arguments, **clip, **last)
        case "ddpm":
            scheduler = DDPMScheduler(**arguments, **clip, variance_type=spec.variance_type)
        case "pndm":
            scheduler = PNDMScheduler(**arguments, **last, skip_prk_steps=spec.skip_prk_steps)
        case _:
            raise ValueError(
                f"[verify] scheduler={spec.scheduler}: MONAI has none; choose ddim, ddpm or pndm"
            )
    scheduler.set_timesteps(steps)
    return scheduler


class _Observed:
    """The UNet as the inferer calls it; notes what it is shown and what it answers. With guidance x is `[2N, ...]`,
    the unconditional half first.
    """

    def __init__(
        self,
        unet: nn.Module,
        channels: int,
        conditional: Mapping[str, Array],
        unconditional: Mapping[str, Array] | None,
        segmentation: Tensor | None,
        keep: Collection[int],
        on_step: Callable[[int], object],
    ) -> None:
        names = tuple(conditional)
        # The inferer fills the other branch with one number; a negative condition is more than that.
        filled = unconditional is None or all(np.ptp(value) == 0 for value in unconditional.values())
        self.lone = names[0] if names in (("context",), ("concat",)) and filled else None
        self.timesteps: list[float] = []
        self.calls: dict[int, NetworkCall] = {}
        self._unet = unet
        self._channels = channels
        self._guided = unconditional is not None
        self._segmentation = segmentation if isinstance(unet, SPADEDiffusionModelUNet) else None
        self._keep = keep
        self._on_step = on_step
        self.bound: dict[str, Tensor] = {}
        if self.lone is None:
            branches = [conditional] if unconditional is None else [unconditional, conditional]
            self.bound = {
                name: torch.from_numpy(np.concatenate([values[name] for values in branches]))
                for name in names
            }

    def __call__(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, **residuals: Any
    ) -> Tensor:
        given: dict[str, Any] = {"context": context, **self.bound, **residuals}
        if self._segmentation is not None:
            repeats = x.shape[0] // self._segmentation.shape[0]
            given["seg"] = self._segmentation.repeat(repeats, *[1] * (x.ndim - 1))
        if "concat" in self.bound:
            x = torch.cat((x, given.pop("concat")), dim=1)
        # The inferer's single timestep would not broadcast where MAISI's UNet concatenates its embeddings.
        out: Tensor = self._unet(x, timesteps=timesteps.expand(x.shape[0]), **given)
        index = len(self.timesteps)
        self.timesteps.append(float(timesteps[0]))
        if index in self._keep:
            outputs = [_array(half) for half in out.chunk(2 if self._guided else 1)]
            self.calls[index] = NetworkCall(
                t=self.timesteps[-1],
                x=_array(x[: len(outputs[0]), : self._channels]),
                conditional=outputs[-1],
                unconditional=outputs[0] if self._guided else None,
            )
        self._on_step(index + 1)
        return out


class _ObservedDecoder:
    def __init__(self, autoencoder: nn.Module, segmentation: Tensor | None) -> None:
        self._autoencoder = autoencoder
        spade = isinstance(autoencoder, SPADEAutoencoderKL)
        self._segmentation = {"seg": segmentation} if spade else {}
        self.z = torch.empty(0)

    def decode_stage_2_outputs(self, z: Tensor) -> Any:
        self.z = z
        return self._autoencoder.decode_stage_2_outputs(z, **self._segmentation)  # type: ignore[operator]


class _Noise(TorchFunctionMode):
    """Within it, the k-th `torch.randn` gives `noise(k + 1)`: MONAI's schedulers take no noise from outside."""

    def __init__(self, noise: Callable[[int], Array]) -> None:
        super().__init__()
        self._noise = noise
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            self._calls += 1
            return torch.from_numpy(np.ascontiguousarray(self._noise(self._calls)))
        return func(*args, **(kwargs or {}))


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().numpy().copy()
    return array
