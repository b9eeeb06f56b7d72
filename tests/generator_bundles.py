"""Bundles of one-pass networks as they are published (mednist_gan; the SPADE tutorial's), with random weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import Generator, SPADENet

CONFIGS = Path(__file__).parent / "configs"
# The tutorial's arguments (tutorials/generation/spade_gan), narrowed; in 3D they are volcast's own.
SPADE: dict[str, Any] = {
    "in_channels": 1, "out_channels": 1, "label_nc": 6, "input_shape": [16, 32], "channels": [4, 8, 16], "z_dim": 5,
    "is_vae": True, "spade_intermediate_channels": 8,
}  # fmt: skip
LABELS = ["background", "CSF", "grey matter", "white matter", "deep grey matter", "brainstem"]


def randomise(network: Any) -> Any:
    """Every parameter N(0, 1 / fan-in), biases and slopes N(0, 0.2^2): every part of the network matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        scale = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def mednist_gan(root: Path, *, wrapped: bool = True) -> Any:
    """The zoo's bundle at full size (0.1 M parameters) under `root`; MONAI's network in it."""
    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    (root / "configs" / "inference.json").write_bytes((CONFIGS / "mednist_gan.json").read_bytes())
    network = randomise(Generator(64, (64, 8, 8), (32, 16, 8, 1), (2, 2, 2, 1)))
    state = network.state_dict()
    torch.save({"model": state} if wrapped else state, root / "models" / "model.pt")
    return network


def spade_gan(root: Path, dims: int, labels: Sequence[str] = LABELS, **changes: Any) -> Any:
    """A bundle of a SPADENet under `root`; MONAI's network in it."""
    arguments = SPADE | {"spatial_dims": dims, "input_shape": [16, 32, 8][:dims]} | changes
    config = {
        "generator_def": {"_target_": "monai.networks.nets.SPADENet", **arguments},
        "load": "$@generator_def.load_state_dict(torch.load(@bundle_root + '/models/model.pt'))",
        "labels": list(labels),
        "spacing_mm": [2.0] * dims,
    }
    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    (root / "configs" / "inference.json").write_text(json.dumps(config))
    network = randomise(SPADENet(**json.loads(json.dumps(arguments))))
    torch.save(network.state_dict(), root / "models" / "model.pt")
    return network
