"""The bundled VQVAE with its transformer, trained weights: against MONAI, and the example of docs/transformer.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from accuracy import assert_as_accurate
from PIL import Image

import volcast
from volcast.export.transformer_bundle import read_transformer, with_masks
from volcast.runtime.default_artifact import BUNDLE
from volcast.runtime.token_sequence import TokenSequence

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "tokens.py"
FIRST = 20
"""Tokens compared one by one."""


def test_trained_weights_against_monai(token_artifact_folder: Path) -> None:
    model = volcast.load(token_artifact_folder, engine="onnxruntime", threads=1)
    bundle = read_transformer(BUNDLE, config=Path("configs/transformer.json"))
    vqvae, transformer = bundle.vqvae, with_masks(bundle.transformer, FIRST)
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.random((1, 1, 32, 48, 32), np.float32))
    with torch.no_grad():
        codes = vqvae.index_quantize(image)  # type: ignore[operator]
        assert (
            model.encode(image.numpy()) == codes.numpy()
        ).mean() > 0.99  # two codes may be as near as rounding tells
        eager = vqvae.decode_samples(codes)  # type: ignore[operator]
        exact = vqvae.double().decode_samples(codes)
    assert_as_accurate(torch.from_numpy(model.decode(codes.numpy())), eager, exact)

    tokens = torch.cat((torch.full((1, 1), 256), codes.reshape(1, -1)[:, : FIRST - 1]), 1)
    with torch.no_grad():
        eager, exact = transformer(tokens), transformer.double()(tokens)
    sequence = TokenSequence(model.spec, model._programs, 1, {})
    steps = [sequence.advance(tokens[:, place : place + 1].numpy(), place) for place in range(FIRST)]
    assert_as_accurate(torch.from_numpy(np.concatenate(steps, 1)), eager, exact)
    log_p = torch.log_softmax(exact, -1)[0, range(FIRST - 1), tokens[0, 1:]]
    found = model.token_likelihood(codes.numpy()).reshape(-1)[: FIRST - 1]
    # Logits of size 30 in float32 through 8 layers: a relative 1e-4 of each, as verify's budget.
    np.testing.assert_allclose(found, log_p.numpy(), rtol=0, atol=1e-4 * float(exact.abs().max()))


def test_the_example(token_artifact_folder: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        str(EXAMPLE),
        str(tmp_path),
        "--artifact",
        str(token_artifact_folder),
        "--samples",
        "1",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"sample 0: ([\d.]+) nats a token, back to front ([\d.]+)\n", done.stdout)
    # The model knows its own samples from their mirror images: a nat a token apart, and 768 tokens.
    assert found is not None and float(found[1]) + 0.5 < float(found[2])
    assert (tmp_path / "tokens_0.nii.gz").stat().st_size > 50_000
    with Image.open(tmp_path / "tokens.png") as picture:
        assert picture.height > 3 * 96
