"""Compares a token model's artifact with MONAI running its bundle: logits, likelihoods, codes and images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from volcast.runtime.artifact import read_manifest
from volcast.runtime.engine import Engine
from volcast.runtime.token_model import load_tokens

from .similarity import relative_l2
from .transformer_bundle import TransformerBundle, with_masks
from .verification import Check, Verification, network_budget

CODES = 1e-2
"""Share of codes that may differ: two codes may be as near as float32 tells, seldom."""


def verify_tokens(
    artifact: Path,
    bundle: TransformerBundle,
    *,
    engine: str | Engine = "auto",
    threads: int | None = None,
    seed: int = 0,
    condition: Mapping[str, Any] | None = None,
) -> Verification:
    """Sample once, then compare on that sample: the logits after every token, as the cache gave them one by one, with
    MONAI's transformer over the whole sequence; the decoded image; the codes that the image encodes to.

    Raises ValueError: a bad artifact or argument, or an artifact whose tokens, order or conditions are not the bundle's.
    """
    model = load_tokens(artifact, read_manifest(artifact), engine, threads)
    spec = model.spec
    for fact in ("token_shape", "num_codes", "bos_token", "order", "conditions"):
        if getattr(spec, fact) != getattr(bundle, fact):
            raise ValueError(
                f"[verify] {fact} of the artifact {spec.name!r} is not that of the bundle {bundle.name!r}; give the "
                "bundle (and --set) that the artifact was exported from"
            )
    transformer: Any = with_masks(bundle.transformer, spec.length)
    vqvae: Any = bundle.vqvae
    indices, logits = model.traced(seed, condition=condition)
    ordered = indices.reshape(1, -1)[:, model.order]
    known = np.concatenate((np.full((1, 1), spec.bos_token), ordered[:, :-1]), axis=1)
    values = {key: torch.from_numpy(np.array(value)[None]) for key, value in (condition or {}).items()}
    with torch.no_grad():
        wanted = transformer(torch.from_numpy(known), context=values.get("context"))
        log_p = torch.log_softmax(wanted.double(), -1)[
            0, torch.arange(spec.length), torch.from_numpy(ordered[0])
        ]
        image = vqvae.decode_samples(torch.from_numpy(indices))
        codes = vqvae.index_quantize(image).numpy()
    found = model.token_likelihood(indices, condition=condition).reshape(-1)[model.order]
    budget = network_budget(spec.precision, _stored(bundle.transformer))
    images = network_budget(spec.precision, _stored(bundle.vqvae))
    keys = [key for key in bundle.provenance if key.endswith("_sha256") and key != "config_sha256"]
    other = [key for key in keys if spec.provenance.get(key) != bundle.provenance[key]]
    checks = (
        Check(name="weight files that differ", value=len(other), budget=0),
        Check(name="logits, token by token", value=relative_l2(logits, wanted.numpy()), budget=budget),
        Check(name="log p of the tokens, in blocks", value=relative_l2(found, log_p.numpy()), budget=budget),
        Check(name="decode", value=relative_l2(model.decode(indices), image.numpy()), budget=images),
        Check(
            name="codes of the image that differ",
            value=float((model.encode(image.numpy()) != codes).mean()),
            budget=CODES,
        ),
    )
    subject = f"{spec.name}: {spec.precision} weights on {model.engine.name} against MONAI, {spec.length} tokens, seed {seed}"
    return Verification(subject=subject, checks=checks)


def _stored(network: torch.nn.Module) -> int:
    """How many of a network's tensors are stored in the artifact's precision."""
    return sum(parameter.ndim >= 2 for parameter in network.parameters())
