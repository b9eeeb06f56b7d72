"""The tokens' race: MONAI's turn is its inferer's, and a line holds what was timed. Nothing asserts on speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from token_bundles import CODES, FLAT

import volcast
from volcast.benchmarks import tokens
from volcast.export.transformer_bundle import read_transformer, with_masks


def test_the_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "TOP_K", 1)
    bundle = read_transformer(FLAT.write(tmp_path / "bundle"))
    threads = torch.get_num_threads()
    try:
        line = tokens.race(tmp_path, bundle, "onnxruntime", 1, turns=3)
    finally:
        torch.set_num_threads(threads)
    assert line["tokens"] == 12 and line["monai_turns"] == 3
    assert all(line[clock]["ratio"] > 0 for clock in ("clock", "processor"))

    model = volcast.load(tmp_path / "artifact", engine="onnxruntime", threads=1)
    sequence = torch.full((1, 1), CODES)
    for _ in range(12):
        turn = tokens.monai_turn(with_masks(bundle.transformer, 12), sequence, CODES)
        sequence = torch.cat((sequence, turn), 1)
    assert (model.tokens(1, 1, top_k=1).reshape(1, -1) == sequence[:, 1:].numpy()).all()
