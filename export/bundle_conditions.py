"""The inputs of a UNet besides `x` and `timesteps`, from its constructor and from a bundle's `volcast.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from volcast.export.bundle_config import read_data, validated
from volcast.runtime.frozen import Frozen
from volcast.runtime.quality import QualityBudget
from volcast.runtime.spec import ConditionSpec

SPATIAL_AXES = ("d0", "d1", "d2")
"""Names of the latent's spatial sizes, in order."""
# DiffusionModelUNetMaisi's options and the tensors that they add to forward; one-hot body region, spacing in mm x 100.
_MAISI_INPUTS = {
    "include_top_region_index_input": ("top_region_index_tensor", 4),
    "include_bottom_region_index_input": ("bottom_region_index_tensor", 4),
    "include_spacing_input": ("spacing_tensor", 3),
}


class BundleNotes(Frozen):
    """`configs/volcast.json`: what MONAI's config has no place for."""

    conditions: tuple[ConditionSpec, ...]
    labels: tuple[str, ...] = ()
    quality: QualityBudget | None = None


def read_notes(path: Path) -> BundleNotes:
    """The notes in a file. `labels` names the values of its label maps, from 0."""
    return validated(BundleNotes, read_data(path)[0], str(path))


def network_conditions(
    arguments: Mapping[str, Any], latent_channels: int, tokens: int = 1
) -> tuple[ConditionSpec, ...]:
    """The conditions that a UNet with these constructor arguments takes, in forward's order, `concat` last.

    `concat` is what the sampler concatenates to x on the channel axis: `in_channels` beyond the latent's.
    """
    found = []
    if arguments["with_conditioning"]:
        if type(arguments["cross_attention_dim"]) is not int:
            raise ValueError(
                "[bundle] cross_attention_dim=None: with_conditioning needs it; set it in the config"
            )
        found.append(ConditionSpec(name="context", shape=(tokens, arguments["cross_attention_dim"])))
    if arguments["num_class_embeds"]:
        last = arguments["num_class_embeds"] - 1
        found.append(ConditionSpec(name="class_labels", dtype="int64", shape=(), minimum=0, maximum=last))
    for option, (name, size) in _MAISI_INPUTS.items():
        if arguments.get(option):
            found.append(ConditionSpec(name=name, shape=(size,)))
    extra = arguments["in_channels"] - latent_channels
    if extra < 0:
        raise ValueError(
            f"[bundle] latent_shape has {latent_channels} channels, the UNet's in_channels={arguments['in_channels']} "
            "is fewer; correct it with --set latent_shape=[C,...]"
        )
    if extra:
        found.append(ConditionSpec(name="concat", shape=(extra, *SPATIAL_AXES[: arguments["spatial_dims"]])))
    return tuple(found)


def described_conditions(
    path: Path, derived: tuple[ConditionSpec, ...], others: bool = False
) -> tuple[ConditionSpec, ...]:
    """The conditions as `volcast.json` describes them; they must be the network's, in name, dtype and shape.

    Only the number of context tokens is the file's to say. `others`: it may describe more, those of another network.
    """
    described = read_notes(path).conditions
    if others:
        described = tuple(one for one in described if one.name in {condition.name for condition in derived})
    names = [condition.name for condition in described]
    if sorted(names) != sorted(condition.name for condition in derived):
        wanted = ", ".join(condition.name for condition in derived) or "none"
        raise ValueError(
            f"[bundle] {path}: conditions {names} do not match the network's ({wanted}); describe those"
        )
    by_name = {condition.name: condition for condition in described}
    for network in derived:
        given = by_name[network.name]
        shape = (given.shape[:1] if given.name == "context" else network.shape[:1]) + network.shape[1:]
        numeric = network.name != "context" or (bool(given.shape) and isinstance(given.shape[0], int))
        if given.dtype != network.dtype or given.shape != shape or not numeric:
            raise ValueError(
                f"[bundle] {path}: condition {given.name} is {given.dtype}{list(given.shape)}, the network takes "
                f"{network.dtype}{list(network.shape)}; correct the file"
            )
    return tuple(by_name[network.name] for network in derived)
