"""Reads a MONAI bundle: config, networks with their weights, scheduler, conditions. Nothing in it is executed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from volcast.export.bundle_conditions import described_conditions, network_conditions
from volcast.export.bundle_expression import WeightFile, is_number
from volcast.export.bundle_networks import NetworkPlan
from volcast.export.bundle_plan import BundlePlan, plan_bundle
from volcast.export.weights import LargeFiles, digest, entry, read_checkpoint, scalar, state_dict
from volcast.export.weights_keys import load_weights
from volcast.runtime.spec import ConditionSpec, SchedulerSpec


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A trained model, ready for capture.

    `unet` and `autoencoder` are MONAI 1.6.1 networks in float32, eval mode, on the CPU; `autoencoder` is None for a
    pixel-space model. `latent_shape` is `(C, *spatial)`; `conditions` are the UNet's inputs besides x and timesteps.
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


def read_bundle(
    folder: Path,
    *,
    config: Path | None = None,
    weights: Mapping[str, Path] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Bundle:
    """Read a bundle folder (configs/inference.json|yaml, or `config`), or a plain config file.

    `weights` maps `unet` and `autoencoder` to files that replace the config's. `settings` replace config keys by id
    (`network_def#channels`) and supply what cannot be read; `unet`, `autoencoder`, `scheduler` choose a component by
    its id (None: no autoencoder). Raises ValueError, one line, with the key and the remedy.
    """
    plan = plan_bundle(folder, config=config, weights=weights, settings=settings)
    latent_shape = _latent_shape(plan)
    scheduler = plan.scheduler
    conditions = _conditions(plan, latent_shape[0])
    files = LargeFiles(plan.root)
    provenance = dict(plan.provenance)
    networks: dict[str, torch.nn.Module] = {}
    wrapped: dict[str, Any] = {}
    for role, network in (("unet", plan.unet), ("autoencoder", plan.autoencoder)):
        if network is None:
            continue
        path, keys = plan.weight_file(role, network)
        files.check(path)
        checkpoint = read_checkpoint(path)
        if role == "unet":
            wrapped = checkpoint
        provenance[f"{role}_sha256"] = digest(path)
        networks[role] = _load(network, state_dict(checkpoint, keys, path, role), path, role)
    spacing, where = _spacing(plan)
    provenance["spacing_mm"] = where
    scale_factor, where = _scale_factor(plan, wrapped, files)
    provenance["scale_factor"] = where
    return Bundle(
        name=provenance["bundle"],
        unet=networks["unet"],
        autoencoder=networks.get("autoencoder"),
        scheduler=scheduler,
        scale_factor=scale_factor,
        latent_shape=latent_shape,
        spacing_mm=spacing,
        conditions=conditions,
        provenance=provenance,
    )


def _latent_shape(plan: BundlePlan) -> tuple[int, ...]:
    arguments = plan.unet.arguments
    dims = arguments["spatial_dims"]
    remedy = f"give it with --set latent_shape=[C,{','.join(['SIZE'] * dims) if type(dims) is int and dims < 4 else '...'}]"
    if "latent_shape" in plan.config:
        shape = plan.config.need("latent_shape", remedy)
    elif len({noise[1:] for noise in plan.noises}) == 1:
        shape = list(plan.noises[0][1:])
    else:
        raise ValueError(f"[bundle] latent_shape: the config has neither it nor one noise shape; {remedy}")
    good = isinstance(shape, list | tuple) and all(type(size) is int and 0 < size <= 2**20 for size in shape)
    if not good or len(shape) != dims + 1 or dims not in (2, 3):
        raise ValueError(f"[bundle] latent_shape={str(shape)[:80]}: need (C, then {dims} sizes); {remedy}")
    levels = len(arguments.get("channels") or arguments["num_channels"])
    if any(size % 2 ** (levels - 1) for size in shape[1:]):
        raise ValueError(
            f"[bundle] latent_shape={list(shape)}: sizes must be multiples of {2 ** (levels - 1)} ({levels} levels)"
        )
    if shape[0] != arguments["out_channels"]:
        raise ValueError(
            f"[bundle] latent_shape={list(shape)}: the UNet makes {arguments['out_channels']} channels; {remedy}"
        )
    if plan.autoencoder is not None and plan.autoencoder.arguments["latent_channels"] != shape[0]:
        raise ValueError(
            f"[bundle] latent_shape={list(shape)}: the autoencoder has latent_channels="
            f"{plan.autoencoder.arguments['latent_channels']}; choose another with --set autoencoder=KEY"
        )
    return tuple(shape)


def _conditions(plan: BundlePlan, latent_channels: int) -> tuple[ConditionSpec, ...]:
    tokens = plan.config.need("context_tokens") if "context_tokens" in plan.config else 1
    if type(tokens) is not int or not 1 <= tokens <= 2**16:
        raise ValueError(f"[bundle] context_tokens={tokens!r}: need 1..{2**16}; --set context_tokens=1")
    derived = network_conditions(plan.unet.arguments, latent_channels, tokens)
    notes = plan.config_file.parent / "volcast.json"
    return described_conditions(notes, derived) if notes.is_file() else derived


def _load(network: NetworkPlan, state: Mapping[str, torch.Tensor], path: Path, role: str) -> torch.nn.Module:
    def build(generative: bool) -> torch.nn.Module:
        if not generative:
            return network.build()
        # GM projects after attention in its transformer blocks only (weights_keys.py).
        return network.build(include_fc=bool(network.arguments.get("with_conditioning", False)))

    return load_weights(build, state, path, role)


def _spacing(plan: BundlePlan) -> tuple[tuple[float, ...], str]:
    """Voxel size in mm and where it was found."""
    dims = plan.unet.arguments["spatial_dims"]
    for key in ("spacing_mm", "spacing"):
        if key in plan.config:
            value = plan.config.need(key, "give it with --set spacing_mm=[...]")
            values = value if isinstance(value, list | tuple) else [value]
            if len(values) != dims or not all(is_number(v) and 0 < v <= 1000 for v in values):
                raise ValueError(
                    f"[bundle] {key}={str(value)[:80]}: need {dims} sizes in mm; --set spacing_mm=[...]"
                )
            return tuple(float(v) for v in values), f"config {key}"
    return (1.0,) * dims, "assumed 1 mm"


def _scale_factor(
    plan: BundlePlan, unet_checkpoint: Mapping[str, Any], files: LargeFiles
) -> tuple[float, str]:
    """What the latent is divided by before decoding, and where it was found."""
    remedy = "give it with --set scale_factor=..."
    value, where = 1.0, "assumed 1"
    if "scale_factor" in plan.config:
        value, where = plan.config.need("scale_factor", remedy), "config"
        if isinstance(value, WeightFile):
            path = plan.weights.get("unet") or plan.local(value.path, "--set scale_factor=...")
            checkpoint = unet_checkpoint
            if "unet" not in plan.weights and value.path != plan.loads.get(plan.unet.id, WeightFile("")).path:
                files.check(path)
                checkpoint = read_checkpoint(path)
            value, where = scalar(entry(checkpoint, value.keys, path, remedy), path, value.keys), path.name
    elif "scale_factor" in unet_checkpoint:
        value, where = (
            scalar(unet_checkpoint["scale_factor"], Path("checkpoint"), ("scale_factor",)),
            "checkpoint",
        )
    if not is_number(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"[bundle] scale_factor={str(value)[:80]}: need a number above 0; {remedy}")
    return float(value), where
