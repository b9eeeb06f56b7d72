"""Label maps and hints: what SPADE networks and ControlNets of a bundle are shown, and whether these fit the UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from torch import Tensor

from volcast.export.bundle_conditions import SPATIAL_AXES, read_notes
from volcast.export.bundle_config import Config, one_line, shown
from volcast.export.bundle_expression import Component
from volcast.export.bundle_networks import NetworkPlan, kind_of, plan_network
from volcast.export.networks import MASK, SCALE
from volcast.runtime.spec import ConditionField, ConditionSpec

IMAGE_AXES = ("o0", "o1", "o2")
"""Names of the image's spatial sizes, in order."""
LARGEST_SCALE = 2.0
_MOST_BITS = 12


@dataclass(frozen=True, kw_only=True)
class Masks:
    """The conditions that label maps and hints add, `encodings` as `Denoiser` takes them, and each ControlNet's hint."""

    conditions: tuple[ConditionSpec, ...]
    encodings: Mapping[str, Tensor]
    hints: tuple[str, ...]


def plan_controls(read: Config, ids: Sequence[str], unet: NetworkPlan) -> tuple[NetworkPlan, ...]:
    """The ControlNets under these ids of the config. ValueError for one that is none, or that is no copy of the UNet."""
    targets = read.targets()
    there = [id for id, target in targets.items() if (kind := kind_of(target)) and kind.role == "controlnet"]
    plans: list[NetworkPlan] = []
    for id in ids:
        component = read.need(id) if id in read else None
        if not isinstance(component, Component) or component.id not in there:
            names = ", ".join(there) or "none"
            raise ValueError(
                f"[bundle] --controlnet {one_line(id)}: no ControlNet of the config; there: {names}"
            )
        target = str(read.raw(component.id).get("_target_"))
        plan = plan_network(component.id, target, read.arguments(component.id))
        if plan.id in [other.id for other in plans]:
            raise ValueError(f"[bundle] --controlnet {plan.id} is given twice; give it once")
        _check_fit(plan, unet)
        plans.append(plan)
    return tuple(plans)


def _check_fit(control: NetworkPlan, unet: NetworkPlan) -> None:
    """MONAI adds as many residuals as both have, whatever they are of."""
    ours, theirs = _shape(control.arguments), _shape(unet.arguments)
    if control.arguments["with_conditioning"]:
        ours["cross_attention_dim"] = control.arguments["cross_attention_dim"]
        theirs["cross_attention_dim"] = unet.arguments["cross_attention_dim"]
    if control.arguments["num_class_embeds"]:
        ours["num_class_embeds"] = control.arguments["num_class_embeds"]
        theirs["num_class_embeds"] = unet.arguments["num_class_embeds"]
    for key, value in ours.items():
        if value != theirs[key]:
            raise ValueError(
                f"[bundle] {control.id}#{key}={shown(value)}: {unet.id} has {shown(theirs[key])}; give a ControlNet "
                "that was trained for it"
            )


def _shape(arguments: Mapping[str, Any]) -> dict[str, Any]:
    channels = list(arguments.get("channels") or arguments["num_channels"])
    blocks = arguments["num_res_blocks"]
    return {
        "spatial_dims": arguments["spatial_dims"],
        "in_channels": arguments["in_channels"],
        "channels": channels,
        "num_res_blocks": [blocks] * len(channels) if isinstance(blocks, int) else list(blocks),
    }


def plan_masks(
    unet: NetworkPlan, autoencoder: NetworkPlan | None, controls: Sequence[NetworkPlan], labels: Sequence[str]
) -> Masks:
    """What the networks are shown besides x, timesteps and the UNet's own conditions.

    SPADE takes a label map as one channel a label. So does a ControlNet with as many channels as there are `labels`
    (names, from 0); MAISI's takes the label's bits, lowest first; any other an array of its channels.
    """
    dims = unet.arguments["spatial_dims"]
    axes = (SPATIAL_AXES if autoencoder is None else IMAGE_AXES)[:dims]
    conditions: list[ConditionSpec] = []
    encodings: dict[str, Tensor] = {}

    def add(table: Tensor | None, channels: int, names: Sequence[str], seen_by: str) -> str:
        base = "hint" if table is None else MASK
        taken = [one.name for one in conditions if one.name == base or one.name.startswith(f"{base}_")]
        name = base if not taken else f"{base}_{len(taken) + 1}"
        if table is None:
            text = f"required: what {seen_by} is shown, {channels} channels"
            conditions.append(ConditionSpec(name=name, shape=(channels, *axes), description=text))
            return name
        encodings[name] = table
        named = ", ".join(f"{value} {label[:40]}" for value, label in enumerate(names[:32]))
        conditions.append(
            ConditionSpec(
                name=name,
                dtype="int64",
                shape=axes,
                minimum=0,
                maximum=len(table) - 1,
                labels=tuple(names),
                description=f"required: a label map for {seen_by}" + (f": {named}" if named else ""),
            )
        )
        return name

    used = False
    spade = {plan.id: plan.arguments["label_nc"] for plan in (unet, autoencoder)
             if plan is not None and "label_nc" in plan.arguments}  # fmt: skip
    if spade:
        channels = next(iter(spade.values()))
        if len(set(spade.values())) > 1 or labels and len(labels) != channels:
            raise ValueError(
                f"[bundle] labels={shown(list(labels))}: need the {' and '.join(map(str, spade.values()))} of "
                f"{' and '.join(spade)} (label_nc), which take one label map; correct it with --set labels=[...]"
            )
        add(torch.eye(channels), channels, labels, " and ".join(spade))
        used = True
    hints = []
    for control in controls:
        channels = control.arguments["conditioning_embedding_in_channels"]
        one_hot = len(labels) == channels
        used |= one_hot
        if one_hot:
            table: Tensor | None = torch.eye(channels)
        elif control.kind.network is ControlNetMaisi and channels <= _MOST_BITS:
            table = _bits(channels)
        else:
            table = None
        hints.append(add(table, channels, labels if one_hot else (), control.id))
    if labels and not used and controls:
        raise ValueError(
            f"[bundle] labels={shown(list(labels))}: no ControlNet has {len(labels)} channels "
            "(conditioning_embedding_in_channels); correct it with --set labels=[...]"
        )
    if hints:
        fields = tuple(
            ConditionField(
                name=f"{hint}_scale", minimum=0, maximum=LARGEST_SCALE, default=1,
                description=f"how strongly {control.id} acts; 0: not at all",
            )
            for hint, control in zip(hints, controls, strict=True)
        )  # fmt: skip
        conditions.append(ConditionSpec(name=SCALE, shape=(len(hints),), fields=fields))
    return Masks(conditions=tuple(conditions), encodings=encodings, hints=tuple(hints))


def read_labels(read: Config, notes: Path | None) -> tuple[str, ...]:
    """The names of a label map's values, from 0: a setting, or what volcast.json (`notes`) says."""
    if "labels" not in read:
        return () if notes is None else read_notes(notes).labels
    labels = read.need("labels")
    good = isinstance(labels, list | tuple) and all(
        isinstance(one, str) and 0 < len(one) <= 100 for one in labels
    )
    if not good or not 1 < len(labels) <= 2**12:
        raise ValueError(
            f'[bundle] labels={shown(labels)}: need 2..{2**12} names; --set labels=\'["background","organ"]\''
        )
    return tuple(labels)


def _bits(count: int) -> Tensor:
    """[2^count, count]: every number's bits, lowest first (MAISI's `binarize_labels`)."""
    return (torch.arange(2**count)[:, None] >> torch.arange(count) & 1).float()
