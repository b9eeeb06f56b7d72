"""Reads the bundle of a network that makes an image in one pass: MONAI's Generator (a GAN) or SPADENet. Nothing is executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai
import torch
from monai.networks.nets.spade_network import SPADENet

from volcast.export.bundle import read_spacing
from volcast.export.bundle_config import Config, one_line, read_data
from volcast.export.bundle_masks import IMAGE_AXES, read_labels
from volcast.export.bundle_networks import NetworkPlan, kind_of, plan_network
from volcast.export.bundle_plan import find_config, scan
from volcast.export.networks import MASK
from volcast.export.weights import LargeFiles, digest, read_checkpoint, state_dict
from volcast.export.weights_keys import load_weights
from volcast.runtime.spec import ConditionSpec

SETTINGS = frozenset({"bundle_root", "labels", "spacing_mm", "generator", "generator_weights_key"})


@dataclass(frozen=True, kw_only=True)
class GeneratorBundle:
    """A trained one-pass model, ready for capture.

    `network` is MONAI's Generator or SPADENet in float32, eval mode, on the CPU. `noise_shape` and `image_shape` are as in
    `GeneratorSpec`; `labels`: channels of SPADENet's label map, 0 for a Generator; `sigmoid`: the bundle applies one to
    the network's output.
    """

    name: str
    network: torch.nn.Module
    noise_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    labels: int
    sigmoid: bool
    spacing_mm: tuple[float, ...]
    conditions: tuple[ConditionSpec, ...]
    provenance: dict[str, str]


def has_generator(folder: Path, config: Path | None) -> bool:
    """Whether the config of a bundle is that of a one-pass model: a component is one, and none is a diffusion UNet."""
    targets = Config(read_data(find_config(folder, config)[1])[0], {}, frozenset()).targets()
    roles = {kind.role for kind in map(kind_of, targets.values()) if kind is not None}
    return "generator" in roles and "unet" not in roles


def read_generator(
    folder: Path,
    *,
    config: Path | None = None,
    weights: Mapping[str, Path] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> GeneratorBundle:
    """Read a bundle folder (configs/inference.json|yaml, or `config`), or a plain config file.

    Its weights are a file of `weights` (`generator`), of a `load_state_dict` of the config, or of its CheckpointLoader.
    `settings` replace config keys by id; `generator` chooses a component by its id. Raises ValueError, one line, with
    the key and the remedy.
    """
    root, file = find_config(folder, config)
    data, config_sha256 = read_data(file)
    read = Config(data, {"bundle_root": str(root), **(settings or {})}, SETTINGS)
    unknown = sorted((weights or {}).keys() - {"generator"})
    if unknown:
        raise ValueError(f"[bundle] --weights {unknown[0]}=...: need generator=FILE")
    plan = _network(read)
    path, keys = weight_file(read, root, plan, weights or {})
    LargeFiles(root).check(path)
    checkpoint = read_checkpoint(path)
    given = read.need("generator_weights_key") if "generator_weights_key" in read else None
    # MONAI's CheckpointSaver leaves the key out where it saves one network alone.
    state = state_dict(
        checkpoint, (given,) if given else keys if set(keys) <= checkpoint.keys() else (), path, "generator"
    )
    network = load_weights(plan.build(), state, path, "generator")
    noise_shape = _noise_shape(plan)
    image_shape = _image_shape(plan, noise_shape)
    metadata_file = file.parent / "metadata.json"
    metadata = read_data(metadata_file)[0] if metadata_file.is_file() else {}
    spacing, found_spacing = read_spacing(read, len(image_shape) - 1)
    name = one_line(metadata.get("name") or root.name or "model")
    labels = plan.arguments.get("label_nc", 0)
    sigmoid = _sigmoid(read)
    return GeneratorBundle(
        name=name,
        network=network,
        noise_shape=noise_shape,
        image_shape=image_shape,
        labels=labels,
        sigmoid=sigmoid,
        spacing_mm=spacing,
        conditions=_conditions(read, root, file, plan, len(image_shape) - 1),
        provenance={
            "bundle": name,
            "bundle_version": one_line(metadata.get("version", "unknown")),
            "monai_version": monai.__version__,
            "config": file.name,
            "config_sha256": config_sha256,
            "generator_class": plan.kind.network.__name__,
            "generator_file": path.name,
            "generator_sha256": digest(path),
            "activation": "sigmoid" if sigmoid else "none",
            "spacing_mm": found_spacing,
        },
    )


def _network(read: Config) -> NetworkPlan:
    kinds = {id: kind_of(target) for id, target in read.targets().items()}
    ids = [id for id, kind in kinds.items() if kind is not None and kind.role == "generator"]
    chosen = read.raw("generator") if "generator" in read else None
    if isinstance(chosen, str):
        ids = [id for id in ids if id == chosen]
    if len(ids) != 1:
        found = (
            f"several networks are one: {', '.join(ids)}; choose"
            if ids
            else "the config has none there; choose another"
        )
        raise ValueError(f"[bundle] generator: {found} with --set generator=KEY")
    arguments = read.arguments(ids[0])
    if type(arguments.get("latent_shape")) is int:  # as MONAI takes it
        arguments["latent_shape"] = [arguments["latent_shape"]]
    return plan_network(ids[0], str(read.raw(ids[0]).get("_target_")), arguments)


def weight_file(
    read: Config, root: Path, plan: NetworkPlan, weights: Mapping[str, Path]
) -> tuple[Path, tuple[str, ...]]:
    """The file of the config's one network, and the keys inside it. ValueError: none that can be read."""
    role = plan.kind.role
    remedy = f"give the file with --weights {role}=FILE"
    if role in weights:
        return Path(weights[role]), ()
    source = scan(read)[0].get(plan.id)
    path, keys = ("", ()) if source is None else (source.path, source.keys)
    loaders = [
        id for id, target in read.every_target().items() if target.rpartition(".")[2] == "CheckpointLoader"
    ]
    if source is None and len(loaders) == 1:
        path = read.need(f"{loaders[0]}#load_path", remedy)
        names = read.raw(f"{loaders[0]}#load_dict")
        keys = tuple(names) if isinstance(names, dict) and len(names) == 1 else ()
    inside = isinstance(path, str) and path and (root / path).resolve().is_relative_to(root.resolve())
    if not inside:
        raise ValueError(f"[bundle] {plan.id}: the config names no weight file of it inside {root}; {remedy}")
    return root / path, keys


def _noise_shape(plan: NetworkPlan) -> tuple[int, ...]:
    if plan.kind.network is not SPADENet:
        return tuple(plan.arguments["latent_shape"])
    if not plan.arguments["is_vae"]:
        return ()
    if plan.arguments["z_dim"] is None:
        raise ValueError(
            f"[bundle] {plan.id}#z_dim=None: need a number with is_vae; --set {plan.id}#z_dim=..."
        )
    return (plan.arguments["z_dim"],)


def _image_shape(plan: NetworkPlan, noise_shape: tuple[int, ...]) -> tuple[int, ...]:
    if plan.kind.network is SPADENet:
        return (plan.arguments["out_channels"], *plan.arguments["input_shape"])
    try:
        return tuple(plan.build()(torch.empty(1, *noise_shape, device="meta")).shape[1:])
    except RuntimeError as error:
        raise ValueError(f"[bundle] {plan.id}: {one_line(error)}; correct its shapes and strides") from None


def _sigmoid(read: Config) -> bool:
    """Whether the bundle's postprocessing applies a sigmoid to what the network makes."""
    for id, target in read.every_target().items():
        if target.rpartition(".")[2] in ("Activations", "Activationsd", "ActivationsD"):
            options = read.raw(id)
            other = [key for key in ("softmax", "other") if options.get(key)]
            if other:
                raise ValueError(
                    f"[bundle] {id}#{other[0]}: a sigmoid alone is known; leave it out with --set {id}#{other[0]}=null"
                )
            if options.get("sigmoid") is True:
                return True
    return False


def _conditions(
    read: Config, root: Path, file: Path, plan: NetworkPlan, dims: int
) -> tuple[ConditionSpec, ...]:
    if plan.kind.network is not SPADENet:
        return ()
    places = (root / "configs" / "volcast.json", file.parent / "volcast.json")
    labels = read_labels(read, next((notes for notes in places if notes.is_file()), None))
    count = plan.arguments["label_nc"]
    if labels and len(labels) != count:
        raise ValueError(
            f"[bundle] labels={list(labels)}: {plan.id} has label_nc={count}; correct it with --set labels=[...]"
        )
    named = ", ".join(f"{value} {label[:40]}" for value, label in enumerate(labels[:32]))
    return (
        ConditionSpec(
            name=MASK,
            dtype="int64",
            shape=IMAGE_AXES[:dims],
            minimum=0,
            maximum=count - 1,
            labels=labels,
            description=f"required: a label map for {plan.id}" + (f": {named}" if named else ""),
        ),
    )
