"""Reads a MONAI bundle: config, networks with their weights, scheduler, conditions. Nothing in it is executed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from volcast.export.bundle_conditions import described_conditions, network_conditions, read_notes
from volcast.export.bundle_config import Config, shown
from volcast.export.bundle_expression import WeightFile, is_number
from volcast.export.bundle_low_res import LowRes, plan_low_res
from volcast.export.bundle_maisi import named_inputs, plan_intensity
from volcast.export.bundle_masks import plan_masks, read_labels
from volcast.export.bundle_networks import NetworkPlan
from volcast.export.bundle_plan import BundlePlan, plan_bundle
from volcast.export.concat_order import put_latent_first
from volcast.export.networks import Control
from volcast.export.text_encoder import ClipTextEncoder, TextPlan, plan_text
from volcast.export.weights import LargeFiles, digest, entry, read_checkpoint, scalar, state_dict
from volcast.export.weights_keys import is_generative, load_weights
from volcast.runtime.intensity import IntensitySpec
from volcast.runtime.quality import QualityBudget
from volcast.runtime.spec import ConditionSpec, LowResSpec, SchedulerSpec


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A trained model, ready for capture.

    `unet` and `autoencoder` are MONAI 1.6.1 networks in float32, eval mode, on the CPU; `autoencoder` is None for a
    pixel-space model. `latent_shape` is `(C, *spatial)`; `conditions` are the inputs besides x and timesteps, those of
    the UNet and those of `controls` and masks, whose label maps `encodings` turns into channels (see `Denoiser`).
    """

    name: str
    unet: torch.nn.Module
    autoencoder: torch.nn.Module | None
    scheduler: SchedulerSpec
    scale_factor: float
    latent_shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    conditions: tuple[ConditionSpec, ...]
    provenance: dict[str, str]
    controls: tuple[Control, ...] = ()
    encodings: Mapping[str, torch.Tensor] = field(default_factory=dict)
    low_res: LowResSpec | None = None
    intensity: IntensitySpec | None = None
    text_encoder: ClipTextEncoder | None = None
    quality: QualityBudget | None = None


def read_bundle(
    folder: Path,
    *,
    config: Path | None = None,
    weights: Mapping[str, Path] | None = None,
    settings: Mapping[str, Any] | None = None,
    controlnets: Sequence[str] = (),
) -> Bundle:
    """Read a bundle folder (configs/inference.json|yaml, or `config`), or a plain config file.

    `weights` maps `unet` and `autoencoder` to files that replace the config's. `settings` replace config keys by id
    (`network_def#channels`) and supply what cannot be read; `unet`, `autoencoder`, `scheduler` choose a component by
    its id (None: no autoencoder). `controlnets` are the ids of those that steer the UNet, which name their `weights`
    too. Raises ValueError, one line, with the key and the remedy.
    """
    plan = plan_bundle(folder, config=config, weights=weights, settings=settings, controlnets=controlnets)
    latent_shape = _latent_shape(plan)
    intensity, found_intensity = plan_intensity(plan.config, plan.autoencoder)
    low_res = plan_low_res(plan.config, plan.unet.arguments, latent_shape[0])
    text = plan_text(plan.config, plan.root, plan.unet.arguments)
    conditions = _conditions(plan, latent_shape[0], low_res, text)
    notes = _notes(plan)
    masks = plan_masks(plan.unet, plan.autoencoder, plan.controls, read_labels(plan.config, notes))
    spacing, found_spacing = read_spacing(plan.config, plan.unet.arguments["spatial_dims"])
    files = LargeFiles(plan.root)
    unet = _load(plan, "unet", plan.unet, files)
    put_latent_first(plan.config, unet.network, latent_shape[0])
    autoencoder = None if plan.autoencoder is None else _load(plan, "autoencoder", plan.autoencoder, files)
    controls = [_load(plan, control.id, control, files) for control in plan.controls]
    scale_factor, found_scale = _scale_factor(plan, unet, files)
    encoder, encoder_provenance = (None, {}) if text is None else text.load()
    return Bundle(
        name=plan.provenance["bundle"],
        unet=unet.network,
        autoencoder=None if autoencoder is None else autoencoder.network,
        scheduler=plan.scheduler,
        scale_factor=scale_factor,
        latent_shape=latent_shape,
        spacing_mm=spacing,
        conditions=conditions + masks.conditions,
        controls=tuple(
            Control(network=one.network, hint=hint) for one, hint in zip(controls, masks.hints, strict=True)
        ),
        encodings=masks.encodings,
        low_res=None if low_res is None else low_res.spec,
        intensity=intensity,
        text_encoder=encoder,
        quality=None if notes is None else read_notes(notes).quality,
        provenance={
            **plan.provenance,
            **unet.provenance,
            **{key: value for one in controls for key, value in one.provenance.items()},
            **({} if autoencoder is None else autoencoder.provenance),
            **({} if low_res is None else {"noise_level": low_res.found}),
            "intensity": found_intensity,
            **encoder_provenance,
            "spacing_mm": found_spacing,
            "scale_factor": found_scale,
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    network: torch.nn.Module
    path: Path
    checkpoint: Mapping[str, Any]
    provenance: Mapping[str, str]


def _load(plan: BundlePlan, role: str, network: NetworkPlan, files: LargeFiles) -> _Loaded:
    path, keys = plan.weight_file(role, network)
    files.check(path)
    checkpoint = read_checkpoint(path)
    state = state_dict(checkpoint, keys, path, role)
    generative = is_generative(state)
    # GM projects after attention in its transformer blocks only (weights_keys.py).
    changed: dict[str, Any] = (
        {"include_fc": bool(network.arguments.get("with_conditioning"))} if generative else {}
    )
    return _Loaded(
        network=load_weights(network.build(**changed), state, path, role),
        path=path,
        checkpoint=checkpoint,
        provenance={
            f"{role}_class": network.kind.network.__name__,
            f"{role}_file": path.name,
            f"{role}_sha256": digest(path),
            **({f"{role}_keys": "GenerativeModels, proj_attn dropped"} if generative else {}),
        },
    )


def _latent_shape(plan: BundlePlan) -> tuple[int, ...]:
    arguments = plan.unet.arguments
    dims = arguments["spatial_dims"]
    remedy = f"give it with --set latent_shape=[C{',SIZE' * dims}]"
    if "latent_shape" in plan.config:
        shape = plan.config.need("latent_shape", remedy)
    elif len({noise[1:] for noise in plan.noises}) == 1:
        shape = list(plan.noises[0][1:])
    elif plan.autoencoder is not None and "diffusion_train#patch_size" in plan.config:  # MONAI's tutorials
        shape = _tutorial_shape(plan.config, plan.autoencoder.arguments, arguments["out_channels"])
    else:
        raise ValueError(f"[bundle] latent_shape: the config has neither it nor one noise shape; {remedy}")
    good = isinstance(shape, list | tuple) and all(type(size) is int and 0 < size <= 4096 for size in shape)
    if not good or len(shape) != dims + 1 or math.prod(shape) > 2**31:
        raise ValueError(
            f"[bundle] latent_shape={shown(shape)}: need (C, then {dims} sizes), each 1..4096, 2^31 together; {remedy}"
        )
    levels = len(arguments.get("channels") or arguments["num_channels"])
    if any(size % 2 ** (levels - 1) for size in shape[1:]):
        raise ValueError(
            f"[bundle] latent_shape={list(shape)}: sizes must be multiples of {2 ** (levels - 1)} ({levels} levels); {remedy}"
        )
    if shape[0] != arguments["out_channels"]:
        raise ValueError(
            f"[bundle] latent_shape={list(shape)}: the UNet makes {arguments['out_channels']} channels; {remedy}"
        )
    channels = "latent_channels"
    if plan.autoencoder is not None and plan.autoencoder.kind.role == "vqvae":
        channels = "embedding_dim"
    for key, wanted in ((channels, shape[0]), ("spatial_dims", dims)):
        if plan.autoencoder is not None and plan.autoencoder.arguments[key] != wanted:
            raise ValueError(
                f"[bundle] latent_shape={list(shape)}: the autoencoder has {key}={plan.autoencoder.arguments[key]}; "
                "choose another with --set autoencoder=KEY"
            )
    return tuple(shape)


def _tutorial_shape(config: Config, autoencoder: Mapping[str, Any], channels: int) -> Any:
    """The latent of the images on which a tutorial's config trains; what is no list of sizes is refused by the caller."""
    patch = config.need("diffusion_train#patch_size")
    if not isinstance(patch, list | tuple) or not all(type(size) is int for size in patch):
        return patch
    halved = len(autoencoder.get("channels") or autoencoder["num_channels"]) - 1
    return [channels, *(size // 2**halved for size in patch)]


def _conditions(
    plan: BundlePlan, latent_channels: int, low_res: LowRes | None, text: TextPlan | None
) -> tuple[ConditionSpec, ...]:
    tokens = plan.config.need("context_tokens") if "context_tokens" in plan.config else 1
    if type(tokens) is not int or not 1 <= tokens <= 2**16:
        raise ValueError(f"[bundle] context_tokens={shown(tokens)}: need 1..{2**16}; --set context_tokens=1")
    derived = network_conditions(plan.unet.arguments, latent_channels, tokens)
    derived = named_inputs(derived, read_spacing(plan.config, plan.unet.arguments["spatial_dims"])[0])
    derived = derived if low_res is None else low_res.conditions(derived)
    if text is not None:
        derived = (*(one for one in derived if one.name != "context"), text.condition())
    notes = _notes(plan)
    return derived if notes is None else described_conditions(notes, derived, plan.unet_chosen)


def _notes(plan: BundlePlan) -> Path | None:
    places = (plan.root / "configs" / "volcast.json", plan.config_file.parent / "volcast.json")
    return next((notes for notes in places if notes.is_file()), None)


def read_spacing(config: Config, dims: int) -> tuple[tuple[float, ...], str]:
    """Voxel size in mm along each of `dims` axes and where it was found."""
    for key in ("spacing_mm", "spacing"):
        if key in config:
            value = config.need(key, "give it with --set spacing_mm=[...]")
            values = value if isinstance(value, list | tuple) else [value]
            if len(values) != dims or not all(is_number(v) and 0 < v <= 1000 for v in values):
                raise ValueError(
                    f"[bundle] {key}={shown(value)}: need {dims} sizes in mm; --set spacing_mm=[...]"
                )
            return tuple(float(v) for v in values), f"config {key}"
    return (1.0,) * dims, "assumed 1 mm"


def _scale_factor(plan: BundlePlan, unet: _Loaded, files: LargeFiles) -> tuple[float, str]:
    """What the latent is divided by before decoding, and where it was found."""
    remedy = "give it with --set scale_factor=..."
    value: Any = 1.0
    where = "assumed 1"
    if "scale_factor" in plan.config:
        value, where = plan.config.need("scale_factor", remedy), "config"
    elif "scale_factor" in unet.checkpoint:
        value = WeightFile(
            plan.loads[plan.unet.id].path if plan.unet.id in plan.loads else "", ("scale_factor",)
        )
    if isinstance(value, WeightFile):
        beside = plan.unet.id not in plan.loads or value.path == plan.loads[plan.unet.id].path
        path = unet.path if beside else plan.local(value.path, "--set scale_factor=...")
        if not beside:
            files.check(path)
        checkpoint = unet.checkpoint if beside else read_checkpoint(path)
        value, where = scalar(entry(checkpoint, value.keys, path, remedy), path, value.keys), path.name
    if not is_number(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"[bundle] scale_factor={shown(value)}: need a number above 0; {remedy}")
    return float(value), where
