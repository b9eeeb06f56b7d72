"""Compares a one-pass model's artifact with MONAI's own network of its bundle: the image, and the style of an image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets.spade_network import SPADENet
from torch.nn import functional

from volcast.runtime.artifact import read_manifest
from volcast.runtime.engine import Engine
from volcast.runtime.generator_model import load_generator
from volcast.runtime.generator_spec import GeneratorSpec
from volcast.runtime.noise import request_noise

from .generator_bundle import GeneratorBundle
from .networks import MASK
from .similarity import psnr, relative_l2
from .verification import Check, Verification, network_budget


def verify_generator(
    artifact: Path,
    bundle: GeneratorBundle,
    *,
    engine: str | Engine = "auto",
    threads: int | None = None,
    seed: int = 0,
    condition: Mapping[str, Any] | None = None,
) -> Verification:
    """Sample once and compare the volume with MONAI's network on the same noise and label map; then, where there is an
    encoder, the mean and deviation that both find for that volume.

    Raises ValueError: a bad artifact or argument, or an artifact whose shapes or conditions are not the bundle's.
    """
    manifest = read_manifest(artifact)
    assert isinstance(manifest, GeneratorSpec)
    model = load_generator(artifact, manifest, engine, threads)
    spec = model.spec
    for fact in ("noise_shape", "image_shape", "conditions"):
        if getattr(spec, fact) != getattr(bundle, fact):
            raise ValueError(
                f"[verify] {fact} of the artifact {spec.name!r} is not that of the bundle {bundle.name!r}; give the "
                "bundle (and --set) that the artifact was exported from"
            )
    network: Any = bundle.network
    volume = model.sample(seed, condition=condition).array.reshape(1, *spec.image_shape)
    z = torch.from_numpy(request_noise(seed, range(1), 0, spec.noise_shape)) if spec.noise_shape else None
    with torch.no_grad():
        if isinstance(network, SPADENet):
            mask = torch.from_numpy(np.array((condition or {})[MASK], np.int64)[None])
            wanted = network.decode(functional.one_hot(mask, bundle.labels).movedim(-1, 1).float(), z)
        else:
            wanted = network(z)
        wanted = torch.sigmoid(wanted) if bundle.sigmoid else wanted
    budget = network_budget(spec.precision, sum(parameter.ndim >= 2 for parameter in network.parameters()))
    keys = [key for key in bundle.provenance if key.endswith("_sha256") and key != "config_sha256"]
    other = [key for key in keys if spec.provenance.get(key) != bundle.provenance[key]]
    checks = [
        Check(name="weight files that differ", value=len(other), budget=0),
        Check(name="volume", value=relative_l2(volume, wanted.numpy()), budget=budget),
        Check(name="volume, PSNR in dB", value=psnr(volume, wanted.numpy()), budget=None),
    ]
    if "encode" in spec.programs:
        channels = network.in_channels
        given = np.ascontiguousarray(wanted.numpy()[:, [i % wanted.shape[1] for i in range(channels)]])
        with torch.no_grad():
            mean, log_variance = network.encoder(torch.from_numpy(given))
        found = model.encode(given[0])
        theirs = {"mean": mean, "deviation": torch.exp(0.5 * log_variance)}
        for ours, (words, tensor) in zip(found, theirs.items(), strict=True):
            checks.append(
                Check(name=f"style, {words}", value=relative_l2(ours, tensor.numpy()), budget=budget)
            )
    subject = (
        f"{spec.name}: {spec.precision} weights on {model.engine.name} against MONAI, one pass, seed {seed}"
    )
    return Verification(subject=subject, checks=tuple(checks))
