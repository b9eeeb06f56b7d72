"""A request read off its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from volcast.runtime.artifact import read_artifact
from volcast.runtime.asked import read_request
from volcast.runtime.interface import as_bytes, inputs, outputs
from volcast.runtime.spec import ArtifactSpec


@pytest.fixture
def spec(gaussian: Path) -> ArtifactSpec:
    return read_artifact(gaussian)


def one(value: Any, dtype: str) -> np.ndarray:
    return np.array([value], dtype)


def test_every_input_may_be_left_out(spec: ArtifactSpec) -> None:
    asked = read_request(spec, {})
    assert (asked.seed, asked.samples, asked.settings, asked.condition) == (None, 1, {}, {})
    assert (asked.size, asked.image, asked.deadline_s, asked.output_format) == (None, None, None, "float16")


def test_what_is_given_is_read(spec: ArtifactSpec) -> None:
    asked = read_request(
        spec,
        {
            "seed": one(2**64 - 1, "uint64"), "num_samples": one(3, "int32"), "steps": one(7, "int32"),
            "scheduler": as_bytes("pndm"), "guidance": one(2, "float64"), "size": np.array([4, 6, 8], np.int32),
            "priority": one(-8, "int32"), "deadline_s": one(0.5, "float32"), "output_format": as_bytes("nifti"),
            "anterior": one(0.25, "float32"), "image": np.zeros((4, 4, 4), np.float32), "strength": one(0.5, "float64"),
        },
    )  # fmt: skip
    assert (asked.seed, asked.samples, asked.size, asked.priority) == (2**64 - 1, 3, (4, 6, 8), -8)
    assert asked.settings == {"steps": 7, "scheduler": "pndm", "guidance": 2.0, "strength": 0.5}
    assert (
        asked.condition == {"anterior": 0.25} and asked.image is not None and asked.image.shape == (4, 4, 4)
    )
    assert (asked.deadline_s, asked.output_format) == (0.5, "nifti")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sead": one(1, "uint64")}, "unknown input 'sead'; known: seed"),
        ({"seed": one(1, "int64")}, r"seed is int64 \[1\]: need uint64 \[1\]"),
        ({"steps": np.array([1, 2], np.int32)}, r"steps is int32 \[2\]"),
        ({"steps": one(0, "int32")}, "steps=0: need 1..1000"),
        ({"scheduler": as_bytes("euler")}, "scheduler='euler'"),
        ({"scheduler": as_bytes(b"\xff")}, "not UTF-8"),
        ({"scheduler": as_bytes("x" * 101)}, "101 letters"),
        ({"scheduler": np.zeros(0, np.uint8)}, r"\[0\]"),
        ({"guidance": one(np.nan, "float64")}, "guidance=nan"),
        ({"num_samples": one(65, "int32")}, "num_samples=65: need 1..64"),
        ({"output_format": as_bytes("png")}, "need one of float32"),
        ({"preview_every": one(-1, "int32")}, "preview_every=-1"),
        ({"deadline_s": one(np.inf, "float32")}, "deadline_s=inf"),
        ({"priority": one(9, "int32")}, "priority=9: need -8..8"),
    ],
)
def test_bad_requests_are_refused_by_name(spec: ArtifactSpec, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_request(spec, given)
    assert "\n" not in str(caught.value)


def test_a_condition_may_not_take_a_setting_s_name(spec: ArtifactSpec) -> None:
    taken = spec.model_copy(update={"conditions": (spec.conditions[0].model_copy(update={"name": "seed"}),)})
    with pytest.raises(ValueError, match="seed would name two inputs"):
        inputs(taken)


def test_no_tensor_carries_lengths_of_its_own(spec: ArtifactSpec) -> None:
    assert all(np.dtype(tensor.dtype).kind in "iuf" for tensor in (*inputs(spec), *outputs(spec)))
