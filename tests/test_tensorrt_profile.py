"""Ranges of a plan's axes, from the artifact's and from `--batch` and `--size`."""

from __future__ import annotations

from pathlib import Path

import pytest

from volcast.export.tensorrt_profile import (
    as_text,
    axis_ranges,
    one_by_one,
    parse_batch,
    parse_size,
    slab_ranges,
)
from volcast.runtime.artifact import read_artifact
from volcast.runtime.plans import inputs_ranges
from volcast.runtime.spec import ArtifactSpec


@pytest.fixture(scope="module")
def spec(gaussian: Path) -> ArtifactSpec:
    return read_artifact(gaussian)


def test_left_out_they_are_the_artifact_s_own_size(spec: ArtifactSpec) -> None:
    ranges = axis_ranges(spec)
    assert {name: str(one) for name, one in ranges.items()} == {
        "batch": "1:1:4", "steps": "1:20:1000", "d0": "4", "d1": "6", "d2": "4", "o0": "8", "o1": "12", "o2": "8"
    }  # fmt: skip
    assert str(one_by_one(ranges)["batch"]) == "1" and str(ranges["batch"]) == "1:1:4"


def test_asked_for(spec: ArtifactSpec) -> None:
    ranges = axis_ranges(spec, (2, 3), parse_size("2,4,2:4,6,4:8,16,4"))
    assert {name: str(one) for name, one in ranges.items() if name != "steps"} == {
        "batch": "2:2:3", "d0": "2:4:8", "d1": "4:6:16", "d2": "2:4:4", "o0": "4:8:16", "o1": "8:12:32", "o2": "4:8:8"
    }  # fmt: skip
    step = inputs_ranges(spec.programs["step"], ranges)
    assert step["x"] == ((2, 2, 2, 4, 2), (2, 2, 4, 6, 4), (3, 2, 8, 16, 4))
    assert step["row"] == ((2, 2), (2, 2), (3, 2))


@pytest.mark.parametrize(
    ("batch", "size", "message"),
    [
        ((1, 5), None, r"batch=5: need 1\.\.4; nearest: 4"),
        ((3, 2), None, "axis batch 3:3:2: need smallest <= tuned <= largest"),
        (None, "3,4,4", r"d0=3: need 2\.\.16 and a multiple of 2; nearest: 2 or 4"),
        (None, "4,4", r"size=\(4, 4\): need 3 numbers"),
        (None, "4,4,4:2,4,4:8,8,8", "axis d0 4:2:8: need smallest <= tuned <= largest"),
    ],
)
def test_what_the_axes_do_not_allow(
    spec: ArtifactSpec, batch: tuple[int, int] | None, size: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^\[build\] {message}"):
        axis_ranges(spec, batch, None if size is None else parse_size(size))


def test_slabs_range_from_the_fewest_rows_to_all(default_artifact_folder: Path) -> None:
    spec = read_artifact(default_artifact_folder)
    ranges = slab_ranges(spec, axis_ranges(spec, None, parse_size("4,4,4:8,12,8:16,16,12")))
    assert list(ranges) == [f"decode_{number:02d}" for number in range(15)]
    # A norm and a convolution of 3 taps at twice the latent's sizes: a row above and one below; and a skip without.
    assert {name: str(one) for name, one in ranges["decode_08"].items()} == {
        "r0": "3:6:34", "r1": "1:4:32", "d1x2": "8:24:32", "d2x2": "8:16:24"
    }  # fmt: skip
    # One that enlarges makes two rows of each.
    assert str(ranges["decode_06"]["r0"]) == "3:4:18"


def test_texts() -> None:
    assert parse_batch("1:8") == (1, 8) and parse_batch("4") == (4, 4)
    assert as_text(parse_size("8,12,8")) == "8,12,8"
    assert as_text(parse_size("4,4,4:8,12,8:16,16,16")) == "4,4,4:8,12,8:16,16,16"
    for text in ("", "1:2:3", "a", "1:", "0", "-1", "²"):
        with pytest.raises(ValueError, match=r"^\[build\] --batch '.*': need SMALLEST:LARGEST"):
            parse_batch(text)
    for text in ("", "8x12", "8,12:8,12", "8,,8", "8,-1"):
        with pytest.raises(ValueError, match=r"^\[build\] --size '.*': need latent sizes as 8,12,8"):
            parse_size(text)
