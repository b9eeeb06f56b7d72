"""`volcast generate` of a token model and of a one-pass model: the volumes of `sample_many`, by processes of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_service_kinds import CONTEXT
from test_serving_kinds import HOW, LABELS
from token_bundles import CODES, DEEP, Tiny

from volcast.__main__ import app
from volcast.runtime.dataset_manifest import check_dataset, volume_name
from volcast.runtime.generate import prepare
from volcast.runtime.generate_worker import Task, Worker
from volcast.runtime.pipeline import load
from volcast.runtime.volume import Volume, read_nifti


def generate(artifact: Path, out: Path, *more: object) -> int:
    words = ["generate", artifact, "--out", out, "--engine", "onnxruntime", "--seed", 5, "-q", *more]
    return app([str(word) for word in words])


def assert_same(folder: Path, wanted: Iterable[Volume]) -> None:
    for index, one in enumerate(wanted):
        found = read_nifti(folder / volume_name(index))
        np.testing.assert_array_equal(found.array, one.array)
        np.testing.assert_array_equal(found.affine, one.affine)
    checked = check_dataset(folder)
    assert not (checked.missing or checked.altered or checked.unlisted)


@pytest.fixture
def tokens(tiny_tokens: Callable[[Tiny], Path]) -> Path:
    return tiny_tokens(DEEP) / "artifact"


@pytest.fixture
def context(tmp_path: Path) -> str:
    np.save(tmp_path / "context.npy", CONTEXT)
    return f"context=@{tmp_path / 'context.npy'}"


def test_tokens_are_made_by_a_process_and_the_next_run_goes_on(
    tokens: Path, context: str, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    choice = ["--temperature", 5, "--top-k", 7, "--top-p", 0.98, "-c", context, "--workers", 1]
    model = load(tokens, engine="onnxruntime", threads=1)
    alone = list(model.sample_many(3, 5, condition={"context": CONTEXT}, **HOW))
    assert generate(tokens, out, "--num", 2, *choice) == 0
    assert_same(out, alone[:2])
    before = (out / volume_name(0)).stat()
    assert generate(tokens, out, "--num", 3, *choice) == 0
    assert_same(out, alone)
    assert (out / volume_name(0)).stat() == before
    described = json.loads((out / "dataset.json").read_text())
    assert {name: described[name] for name in HOW} == HOW and "steps" not in described
    assert generate(tokens, out, "--num", 4, *choice[2:]) != 0, "another temperature is another dataset"


def test_a_label_map_gives_each_volume_of_one_pass_its_place(spade: Path, tmp_path: Path) -> None:
    LABELS.save(tmp_path / "labels.nii.gz")
    generation = prepare(
        spade, 2, seed=5, engine="onnxruntime", condition=[f"mask=@{tmp_path / 'labels.nii.gz'}"]
    )
    (tmp_path / "parts").mkdir()
    worker = Worker(generation.recipe(tmp_path / "parts"))
    worker.load()
    alone = load(spade, engine="onnxruntime", threads=1).sample_many(2, 5, condition={"mask": LABELS})
    for sample, wanted in enumerate(alone):
        found = read_nifti(worker.make(Task(sample=sample, own={})).part)
        np.testing.assert_array_equal(found.array, wanted.array)
        np.testing.assert_array_equal(found.affine, LABELS.affine)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"settings": {"steps": 5}}, "steps: .* samples tokens; known: temperature, top_k, top_p"),
        ({"settings": {"top_k": CODES + 1}}, f"top_k={CODES + 1}: need 1..{CODES}"),
        ({"negative": ["context=0"]}, "negative: .* samples tokens"), ({"condition": []}, "context is missing"),
        ({"engine": "cuda"}, "engine='cuda': .* on one of auto, onnxruntime, openvino"),
    ],
)  # fmt: skip
def test_what_a_token_model_does_not_take_is_refused_before_any_work(
    tokens: Path, context: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(tokens, 1, **{"condition": [context], "engine": "onnxruntime", **given})


def test_one_pass_and_diffusion_models_have_no_temperature(
    spade: Path, gaussian: Path, tmp_path: Path
) -> None:
    LABELS.save(tmp_path / "labels.nii.gz")
    mask = [f"mask=@{tmp_path / 'labels.nii.gz'}"]
    with pytest.raises(ValueError, match="temperature: .* makes an image in one pass; known: none"):
        prepare(spade, 1, condition=mask, settings={"temperature": 1.0})
    with pytest.raises(
        ValueError, match=r"\[generate\] temperature, top_k: for token models .*; leave it out"
    ):
        prepare(gaussian, 1, settings={"temperature": 1.0, "top_k": 3})
