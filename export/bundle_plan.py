"""What a bundle's config says: which networks, loaded from which files, what is missing. No weight file is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import monai

from volcast.export.bundle_config import Config, one_line, read_data, shown
from volcast.export.bundle_expression import Component, Load, Noise, Timesteps, Unreadable, WeightFile
from volcast.export.bundle_low_res import LOW_RES_SCHEDULER
from volcast.export.bundle_low_res import SETTINGS as LOW_RES_SETTINGS
from volcast.export.bundle_masks import plan_controls
from volcast.export.bundle_networks import NetworkPlan, kind_of, known_networks, plan_network
from volcast.export.bundle_scheduler import known_schedulers, read_scheduler, scheduler_name
from volcast.export.concat_order import CONCAT_FIRST
from volcast.export.text_encoder import TEXT_ENCODER
from volcast.runtime.spec import SchedulerSpec

Role = Literal["unet", "autoencoder", "scheduler"]
SETTINGS = frozenset(
    {
        "bundle_root",
        "context_tokens",
        "intensity",
        "labels",
        "latent_shape",
        "modality",
        "num_inference_steps",
        "scale_factor",
        "spacing_mm",
        "unet_weights_key",
        "autoencoder_weights_key",
    }
    | LOW_RES_SETTINGS
    | {TEXT_ENCODER}
    | {CONCAT_FIRST}
)
"""Settings that need no key in the config; `unet`, `autoencoder`, `scheduler` besides, which choose a component."""
TUTORIAL_SCHEDULER = "NoiseScheduler"
# Where bundles keep the component that samples images; MAISI has a second set, mask_generation_*.
_PREFERRED: dict[str, tuple[str, ...]] = {
    "unet": (
        "network_def",
        "unet_def",
        "diffusion_unet_def",
        "diffusion_def",
        "diffusion_model_def",
        "network",
        "unet",
    ),
    "autoencoder": ("autoencoder_def", "autoencoder"),
    "scheduler": ("noise_scheduler", "scheduler", "scheduler_def"),
}


@dataclass(frozen=True, kw_only=True)
class BundlePlan:
    """A bundle's config, found and read; no weight file opened yet. `unet_chosen`: by a setting, not found."""

    root: Path
    config_file: Path
    config: Config
    unet: NetworkPlan
    autoencoder: NetworkPlan | None
    scheduler: SchedulerSpec
    controls: tuple[NetworkPlan, ...] = ()
    unet_chosen: bool = False
    weights: Mapping[str, Path] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    loads: Mapping[str, WeightFile] = field(default_factory=dict)
    noises: tuple[tuple[int, ...], ...] = ()
    unread: tuple[str, ...] = ()

    def weight_file(self, role: str, network: NetworkPlan) -> tuple[Path, tuple[str, ...]]:
        """The file that holds a network's weights and the keys inside it. ValueError if the config does not say."""
        name = f"{role}_weights_key"
        given = self.config.need(name) if name in self.config else None
        if given is not None and not isinstance(given, str):
            raise ValueError(f"[bundle] {name}={shown(given)}: need the name of an entry; --set {name}=NAME")
        source = self.loads.get(network.id)
        keys = (given,) if given is not None else source.keys if source is not None else ()
        if role in self.weights:
            # A file of one's own need not be wrapped as the bundle's is.
            return self.weights[role], keys if given is not None else ()
        if source is None:
            why = f" ({one_line('; '.join(self.unread[:2]))})" if self.unread else ""
            raise ValueError(
                f"[bundle] {network.id}: no load_state_dict of the config that can be read{why}; "
                f"give the file with --weights {role}=FILE"
            )
        return self.local(source.path, f"--weights {role}=FILE"), keys

    def local(self, path: str, remedy: str) -> Path:
        """A path of the config as one inside the bundle; ValueError if it leaves it."""
        inside = os.path.normpath(os.path.join(self.root, path))
        if "\0" in path or os.path.commonpath([inside, self.root]) != str(self.root):
            raise ValueError(
                f"[bundle] {path!r} lies outside the bundle {self.root}; name the file with {remedy}"
            )
        return Path(inside)


def plan_bundle(
    folder: Path,
    *,
    config: Path | None = None,
    weights: Mapping[str, Path] | None = None,
    settings: Mapping[str, Any] | None = None,
    controlnets: Sequence[str] = (),
) -> BundlePlan:
    """The same without opening a weight file: which networks, which files, what is missing."""
    root, file = find_config(folder, config)
    data, config_sha256 = read_data(file)
    chosen = dict(settings or {})
    choices: dict[str, Any] = {
        role: chosen.pop(role)
        for role in ("unet", "autoencoder", "scheduler")
        if role in chosen and (chosen[role] is None or isinstance(chosen[role], str))
    }
    read = Config(
        data, {"bundle_root": str(root), **chosen}, SETTINGS | {f"{id}_weights_key" for id in controlnets}
    )
    roles = ("unet", "autoencoder", *controlnets)
    unknown = sorted((weights or {}).keys() - set(roles))
    if unknown:
        names = " or ".join(f"{role}=FILE" for role in roles)
        raise ValueError(f"[bundle] --weights {unknown[0]}=...: need {names}")
    unet, autoencoder = _network(read, "unet", choices), _network(read, "autoencoder", choices)
    assert unet is not None  # _network raises for a missing UNet
    if autoencoder is None and "autoencoder" in (weights or {}):
        raise ValueError("[bundle] --weights autoencoder=...: the config has no autoencoder; leave it out")
    traces = sorted(str(key) for key in data if "autoencoder" in str(key) and data[key] is not None)
    if autoencoder is None and traces and "autoencoder" not in choices:
        raise ValueError(
            f"[bundle] {traces[0]} is there and an autoencoder is not: add autoencoder_def, or --set autoencoder=null "
            "for a model of images"
        )
    loads, timesteps, noises, unread = scan(read)
    metadata_file = file.parent / "metadata.json"
    metadata = read_data(metadata_file)[0] if metadata_file.is_file() else {}
    provenance = {
        "bundle": one_line(metadata.get("name") or root.name or "model"),
        "bundle_version": one_line(metadata.get("version", "unknown")),
        "bundle_monai_version": one_line(metadata.get("monai_version", "unknown")),
        "monai_version": monai.__version__,
        "config": file.name,
        "config_sha256": config_sha256,
    }
    return BundlePlan(
        controls=plan_controls(read, controlnets, unet),
        unet_chosen="unet" in choices,
        root=root,
        config_file=file,
        config=read,
        unet=unet,
        autoencoder=autoencoder,
        scheduler=_scheduler(
            read, choices, timesteps, "num_inference_steps" in chosen, unet.arguments["spatial_dims"]
        ),
        weights={role: Path(path) for role, path in (weights or {}).items()},
        provenance=provenance,
        loads=loads,
        noises=noises,
        unread=unread,
    )


def find_config(folder: Path, config: Path | None) -> tuple[Path, Path]:
    """The bundle's folder and its config file: the one named (from here, or else from the bundle), or the usual one."""
    folder = Path(os.path.abspath(folder))
    if config is not None and not config.is_file() and (folder / config).is_file():
        config = folder / config
    if config is None and folder.is_file():
        folder, config = folder.parent, folder
    if config is not None:
        return (folder.parent if folder.name == "configs" else folder), Path(os.path.abspath(config))
    names = [f"inference.{suffix}" for suffix in ("json", "yaml", "yml")]
    for name in names:
        if (folder / "configs" / name).is_file():
            return folder, folder / "configs" / name
    raise ValueError(
        f"[bundle] {folder}: no configs/{' or '.join(names)}; name the config with --config FILE"
    )


def _choose(read: Config, role: Role, candidates: list[str], choices: Mapping[str, Any]) -> str | None:
    """The id of the component for a role: chosen, only one, or the one under a usual name."""
    if role in choices:
        choice: str | None = choices[role]
        if choice is not None and not isinstance(read.need(choice) if choice in read else None, Component):
            raise ValueError(
                f"[bundle] --set {role}={choice}: no component of the config; there: {', '.join(candidates)}"
            )
        return choice
    preferred = [name for name in _PREFERRED[role] if name in candidates]
    if len(candidates) > 1 and not preferred:
        raise ValueError(
            f"[bundle] several components could be the {role}: {', '.join(candidates)}; choose with --set {role}=KEY"
        )
    return preferred[0] if len(candidates) > 1 else candidates[0] if candidates else None


def _network(read: Config, role: Role, choices: Mapping[str, Any]) -> NetworkPlan | None:
    targets = read.targets()
    kinds = {id: kind_of(target) for id, target in targets.items()}
    roles = ("autoencoder", "vqvae") if role == "autoencoder" else (role,)
    # A VQVAE is a latent space too, where the config has no other autoencoder.
    there_are = [[id for id, kind in kinds.items() if kind is not None and kind.role == one] for one in roles]
    id = _choose(read, role, next((ids for ids in there_are if ids), []), choices)
    if id is None:
        if role == "unet":
            there = (
                ", ".join(f"{key}: {target[:80]}" for key, target in list(targets.items())[:5])
                or "no _target_"
            )
            raise ValueError(
                f"[bundle] the config has no diffusion network ({there}); known: {known_networks()}"
            )
        return None
    component = read.get(id).id  # an id may name another one: network_def: "@autoencoder_def"
    target = read.raw(component).get("_target_")
    plan = plan_network(component, str(target), read.arguments(component))
    if plan.kind.role not in roles:
        raise ValueError(f"[bundle] --set {role}={id}: {plan.kind.network.__name__} is no {role}")
    return plan


def _scheduler(
    read: Config,
    choices: Mapping[str, Any],
    timesteps: Mapping[str, int],
    given_steps: bool,
    spatial_dims: int,
) -> SchedulerSpec:
    targets = read.targets()
    candidates = [id for id, target in targets.items() if scheduler_name(target) and id != LOW_RES_SCHEDULER]
    id = _choose(read, "scheduler", candidates, choices)
    if id is None and TUTORIAL_SCHEDULER in read:
        return _tutorial_scheduler(read, spatial_dims)
    if id is None:
        raise ValueError(f"[bundle] the config has no scheduler; known: {known_schedulers()}")
    component = read.get(id).id
    steps = timesteps.get(component)
    # A setting is the last word; the config's own key may be meant for another scheduler than set_timesteps says.
    if "num_inference_steps" in read and (steps is None or given_steps):
        steps = read.need("num_inference_steps")
        if type(steps) is not int or steps < 1:
            raise ValueError(f"[bundle] num_inference_steps={shown(steps)}: need a whole number from 1")
    return read_scheduler(
        component, str(read.raw(component).get("_target_")), read.arguments(component), steps, spatial_dims
    )


def _tutorial_scheduler(read: Config, spatial_dims: int) -> SchedulerSpec:
    """The MONAI tutorials' latent diffusion configs name betas alone; their inference.py makes a DDPMScheduler of them."""
    betas = read.need(TUTORIAL_SCHEDULER)
    if not (isinstance(betas, dict) and betas):
        raise ValueError(f"[bundle] {TUTORIAL_SCHEDULER}={shown(betas)}: need num_train_timesteps and betas")
    steps = read.need("num_inference_steps") if "num_inference_steps" in read else None
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"[bundle] num_inference_steps={shown(steps)}: need a whole number from 1")
    arguments = {"schedule": "scaled_linear_beta", **betas}
    return read_scheduler(TUTORIAL_SCHEDULER, "DDPMScheduler", arguments, steps, spatial_dims)


def scan(
    read: Config,
) -> tuple[dict[str, WeightFile], dict[str, int], tuple[tuple[int, ...], ...], tuple[str, ...]]:
    """What the expressions of the config would load, set and draw: by network id, by scheduler id, noise shapes."""
    loads: dict[str, WeightFile] = {}
    timesteps: dict[str, int] = {}
    noises: list[tuple[int, ...]] = []
    unread: list[str] = []
    for id, text in read.expressions():
        if not any(word in text for word in ("load", "set_timesteps", "rand")):
            continue
        try:
            value = read.get(id)
        except Unreadable as error:
            if "load" in text:
                unread.append(f"{id} {error}")
            continue
        if isinstance(value, Load):
            if loads.setdefault(value.network, value.source) != value.source:
                unread.append(f"{id} loads another file than an expression before it")
                loads[value.network] = WeightFile("")
        elif isinstance(value, Timesteps):
            timesteps.setdefault(value.scheduler, value.steps)
        elif isinstance(value, Noise):
            noises.append(value.shape)
    return (
        {id: source for id, source in loads.items() if source.path},
        timesteps,
        tuple(noises),
        tuple(unread),
    )
