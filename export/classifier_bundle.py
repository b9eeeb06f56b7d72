"""Reads a classifier of noisy images from a bundle's config: MONAI's DiffusionModelEncoder. Nothing is executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .bundle_config import Config, read_data
from .bundle_networks import kind_of, plan_network
from .bundle_plan import find_config
from .generator_bundle import weight_file
from .weights import LargeFiles, digest, read_checkpoint, state_dict
from .weights_keys import load_weights

ROLE = "classifier"
SETTINGS = frozenset({"bundle_root", ROLE, "classifier_weights_key"})


def read_classifier(
    folder: Path,
    latent_shape: Sequence[int],
    *,
    config: Path | None = None,
    weights: Mapping[str, Path] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[torch.nn.Module, dict[str, str]]:
    """The classifier of a bundle folder or config file in float32, eval mode, on the CPU, and its provenance.

    It must take x `[N, *latent_shape]`, by its config.
    Its weights are a file of `weights` (`classifier`), of a `load_state_dict` of the config, or of its CheckpointLoader;
    `settings` replace config keys by id, `classifier` chooses a component. Raises ValueError, one line, with the remedy.
    """
    root, file = find_config(folder, config)
    data, config_sha256 = read_data(file)
    read = Config(data, {"bundle_root": str(root), **(settings or {})}, SETTINGS)
    unknown = sorted((weights or {}).keys() - {ROLE})
    if unknown:
        raise ValueError(f"[bundle] --weights {unknown[0]}=...: need classifier=FILE")
    kinds = {id: kind_of(target) for id, target in read.targets().items()}
    ids = [id for id, kind in kinds.items() if kind is not None and kind.role == ROLE]
    chosen = read.raw(ROLE) if ROLE in read else None
    if isinstance(chosen, str):
        ids = [id for id in ids if id == chosen]
    if len(ids) != 1:
        there = ", ".join(ids) or "none"
        raise ValueError(
            f"[bundle] classifier: need one DiffusionModelEncoder in {file.name}, there: {there}; choose with "
            "--set classifier=KEY"
        )
    plan = plan_network(ids[0], str(read.raw(ids[0]).get("_target_")), read.arguments(ids[0]))
    takes = plan.arguments["in_channels"], *plan.arguments["input_shape"]
    if takes != tuple(latent_shape):
        raise ValueError(
            f"[bundle] {ids[0]} takes x of {_by(takes)} by its in_channels and input_shape: the artifact's latent is "
            f"{_by(latent_shape)}; train one for it, or add this to another artifact"
        )
    path, keys = weight_file(read, root, plan, weights or {})
    LargeFiles(root).check(path)
    checkpoint = read_checkpoint(path)
    given = read.need("classifier_weights_key") if "classifier_weights_key" in read else None
    inside = (given,) if given else keys if set(keys) <= checkpoint.keys() else ()
    network = load_weights(plan.build(), state_dict(checkpoint, inside, path, ROLE), path, ROLE)
    return network, {
        "classifier_config_sha256": config_sha256,
        "classifier_file": path.name,
        "classifier_sha256": digest(path),
    }


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
