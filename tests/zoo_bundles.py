"""Bundles of the model zoo and of MONAI's tutorials that tests/configs holds, narrowed, every weight random."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from volcast.export.bundle import Bundle, read_bundle
from volcast.export.bundle_plan import plan_bundle

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A config, and the settings that narrow it; `generative`: its weights have GenerativeModels' names."""

    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    generative: bool = False

    def read(self, root: Path, rename: Any) -> Bundle:
        """The bundle under `root` with its weight files, those that its config loads and others, read back.

        `rename` gives a state dict GenerativeModels' names.
        """
        source = next(CONFIGS.glob(f"{self.config}.[jy]*"))
        file = root / "configs" / f"inference{source.suffix}"
        file.parent.mkdir(parents=True)
        file.write_bytes(source.read_bytes())
        plan = plan_bundle(root, settings=self.settings)
        generator = torch.Generator().manual_seed(0)
        own: dict[str, Path] = {}
        for role, network in (("unet", plan.unet), ("autoencoder", plan.autoencoder)):
            if network is None:
                continue
            fc = {"include_fc": bool(network.arguments.get("with_conditioning"))} if self.generative else {}
            state = {
                key: _random(key, value, generator) for key, value in network.build(**fc).state_dict().items()
            }
            path, keys = (
                plan.weight_file(role, network) if network.id in plan.loads else (root / f"{role}.pt", ())
            )
            own |= {} if network.id in plan.loads else {role: path}
            path.parent.mkdir(exist_ok=True)
            content = rename(state) if self.generative else state
            torch.save({keys[0]: content, "scale_factor": torch.tensor(0.75)} if keys else content, path)
        return read_bundle(root, settings=self.settings, weights=own)


def _random(key: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """N(0, 1 / fan-in), codes N(0, 1), norm scales 1 + N(0, 0.05^2): MONAI's fresh UNets return exactly 0."""
    noise = torch.randn(like.shape, generator=generator)
    if "quantizer" in key:
        return noise
    scale = 0.05 if like.ndim < 2 else like[0].numel() ** -0.5
    # MAISI's regions and spacings are shown times 100: weights that fit, or float32 has no digits left for x.
    scale *= 0.01 if re.search(r"(region_index|spacing)_layer\.0\.weight", key) else 1
    return scale * noise + (1 if like.ndim == 1 and key.endswith("weight") else 0)
