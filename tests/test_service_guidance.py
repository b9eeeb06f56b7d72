"""Negative conditions, guidance sweeps and masks to inpaint as requests: the bits of the model in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_service import Heard

from volcast import Inpaint
from volcast.runtime.artifact import read_artifact
from volcast.runtime.asked import read_request
from volcast.runtime.interface import as_bytes, inputs
from volcast.runtime.pipeline import Model, load
from volcast.runtime.service import Service

SHAPE = (8, 12, 8)
SCAN = np.random.default_rng(0).normal(1.0, 0.3, SHAPE).astype(np.float32)
MASK = np.zeros(SHAPE, np.float32)
MASK[2:5, 4:8, 1:6] = 1


@pytest.fixture(scope="module")
def model(gaussian: Path) -> Iterator[Model]:
    with load(gaussian, engine="onnxruntime", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def service(gaussian: Path) -> Iterator[Service]:
    opened = Service(load(gaussian, engine="onnxruntime", threads=1))
    yield opened
    opened.close()


def tensors(model: Model, **values: Any) -> dict[str, np.ndarray]:
    dtypes = {tensor.name: tensor.dtype for tensor in inputs(model.spec)}
    return {
        name: as_bytes(value)
        if isinstance(value, str)
        else np.atleast_1d(np.asarray(value, dtypes.get(name)))
        for name, value in {"output_format": "float32", **values}.items()
    }


def answers(service: Service, given: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    heard = Heard()
    service.accept(given, heard)
    assert heard.ended.wait(60) and heard.ends == [("done", "")], heard.ends
    return sorted((dict(one) for one in heard.sent), key=lambda one: int(one["sample"][0]))


@pytest.mark.parametrize(
    "negative",
    [{"anterior": 0.3}, {"context": np.array([[0.2, 0.1, 0.7]])}, {}],
    ids=["field", "whole", "none"],
)
def test_a_negative_condition(model: Model, service: Service, negative: dict[str, Any]) -> None:
    # No decimal here is a float32: the server takes the number, and not what it was rounded to on the way.
    own = {f"negative_{name}": value for name, value in negative.items()}
    (answer,) = answers(service, tensors(model, seed=5, steps=6, guidance=2.1, anterior=0.9, **own))
    alone = model.sample(5, steps=6, guidance=2.1, condition={"anterior": 0.9}, negative=negative)
    np.testing.assert_array_equal(answer["volume_float32"], alone.array)
    assert "guidance" not in answer
    rounded = model.sample(5, steps=6, guidance=float(np.float32(2.1)), condition={"anterior": 0.9}, negative=negative)  # fmt: skip
    assert not np.array_equal(rounded.array, alone.array)


def test_a_sweep_is_numbered_as_sample_many_yields_it(model: Model, service: Service) -> None:
    weights = [1.0, 2.5, 7 / 3]  # of more digits than a float32 keeps
    given = tensors(
        model, seed=5, steps=6, num_samples=2, first_sample=3, guidance=weights, negative_posterior=0.9
    )
    found = answers(service, given)
    expected = list(model.sample_many(5, 5, steps=6, guidance=weights, negative={"posterior": 0.9}))[9:]
    assert [int(one["sample"][0]) for one in found] == list(range(6))
    for number, (answer, volume) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_array_equal(answer["volume_float32"], volume.array)
        assert answer["guidance"] == weights[number % 3]
    assert len({answer["volume_float32"].tobytes() for answer in found}) == 6


def test_what_is_asked_of_each_volume_of_a_sweep(model: Model) -> None:
    asked = read_request(model.spec, tensors(model, num_samples=64, guidance=[0.9]))
    assert (asked.volumes, asked.weights, asked.settings) == (64, (), {"guidance": 0.9})
    asked = read_request(model.spec, tensors(model, num_samples=32, first_sample=7, guidance=[0.9, 3]))
    assert asked.volumes == 64 and asked.weight(63) == 3.0
    assert asked.arguments(63) == {"sample": 38, "guidance": 3.0}


@pytest.mark.parametrize(
    ("how", "strength"),
    [({"resamples": 2}, 1), ({"resamples": 3, "jump_length": 2, "paste": False}, 0.9), ({}, 1)],
)
def test_a_part_is_painted_anew(model: Model, service: Service, how: dict[str, Any], strength: float) -> None:
    own = {f"inpaint_{name}": value for name, value in how.items()}
    given = tensors(
        model, seed=5, steps=10, scheduler="ddpm", image=SCAN, strength=strength, inpaint_mask=MASK, **own
    )
    (answer,) = answers(service, given)
    inpaint = Inpaint(MASK, **how)
    alone = model.submit(
        5, steps=10, scheduler="ddpm", image=SCAN, strength=strength, inpaint=inpaint
    ).result()
    np.testing.assert_array_equal(answer["volume_float32"], alone.array)
    pasted = np.array_equal(alone.array[MASK == 0], SCAN[MASK == 0])
    assert pasted == how.get("paste", True) and not np.array_equal(alone.array[MASK != 0], SCAN[MASK != 0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance": []}, r"guidance is float64 \[0\]: need float64 \['any'\]"),
        ({"guidance": [1, -1]}, "guidance=-1"),
        ({"guidance": [1, np.nan]}, "guidance=nan"),
        ({"guidance": [1] * 65}, r"1 samples at 65 weights are 65 volumes: need 1\.\.64"),
        ({"guidance": [1, 2, 3], "num_samples": 22}, r"22 samples at 3 weights are 66 volumes: need 1\.\.64"),
        ({"negative_anterior": 0.5}, "negative without guidance: give guidance=WEIGHT"),
        ({"negative_anterior": 2, "guidance": 2}, r"\[negative\] anterior=2\.0: need 0\.\.1"),
        ({"negative_front": 2, "guidance": 2}, "unknown input 'negative_front'; known: seed"),
        ({"negative_context": [[0, 1]], "guidance": 2}, r"negative_context is float32 \[1, 2\]: need float32 \[1, 3\]"),
        ({"inpaint_mask": MASK}, "inpaint without an image: give the image"),
        ({"inpaint_mask": MASK[1:], "image": SCAN}, r"the mask is float32 \(7, 12, 8\): need numbers of the image's shape"),
        ({"inpaint_mask": 0 * MASK, "image": SCAN}, "the mask is 0 everywhere"),
        ({"inpaint_mask": 0 * MASK + 1, "image": SCAN}, "no voxel of the latent"),
        ({"inpaint_mask": MASK * np.nan, "image": SCAN}, "holds NaN"),
        ({"inpaint_mask": MASK, "image": SCAN, "scheduler": "pndm"}, "pndm remembers"),
        ({"inpaint_mask": MASK, "image": SCAN, "inpaint_resamples": 0}, r"inpaint_resamples=0: need 1\.\.1000"),
        ({"inpaint_mask": MASK, "image": SCAN, "inpaint_resamples": 501}, "501: 10020 steps in all: need 10000 or fewer"),
        ({"inpaint_mask": MASK, "image": SCAN, "inpaint_resamples": 500, "num_samples": 7}, "7 volumes of 10000 steps: need 64000 or fewer in all; ask for 6 volumes at once"),
        ({"inpaint_mask": MASK, "image": SCAN, "inpaint_jump_length": 20}, "jumps back 20 of 20 steps: need fewer"),
        ({"inpaint_mask": MASK, "image": SCAN, "inpaint_paste": 2}, r"inpaint_paste=2: need 0\.\.1"),
        ({"image": SCAN, "inpaint_paste": 1, "inpaint_resamples": 2}, "inpaint_paste, inpaint_resamples without inpaint_mask"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    model: Model, service: Service, given: dict[str, Any], message: str
) -> None:
    heard = Heard()
    service.accept(tensors(model, **given), heard)
    assert heard.ended.wait(60)
    ((reason, text),) = heard.ends
    with pytest.raises(ValueError, match=message):
        raise ValueError(text)
    assert reason == "invalid" and "\n" not in text and not heard.sent


def test_no_condition_takes_the_name_of_a_negative_one(gaussian: Path) -> None:
    spec = read_artifact(gaussian)
    (context,) = spec.conditions
    field = context.fields[0].model_copy(update={"name": "negative_context"})
    clash = context.model_copy(update={"fields": (field, *context.fields[1:])})
    with pytest.raises(ValueError, match="negative_context would name two inputs"):
        inputs(spec.model_copy(update={"conditions": (clash,)}))
    names = {tensor.name for tensor in inputs(spec.model_copy(update={"conditions": ()}))}
    assert not [name for name in names if name.startswith("negative_")]
