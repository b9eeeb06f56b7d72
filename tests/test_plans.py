"""The manifest of plans: what is read, what is refused and with which command, before a byte reaches a library."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from volcast.runtime.plans import (
    PLANS,
    Host,
    PlanManifest,
    Range,
    check_plans,
    check_sizes,
    read_plan,
    read_plans,
    read_skeleton,
)

ARTIFACT, SOURCE = "a" * 64, "b" * 64
PLAN, SKELETON = b"not for a library" * 10, b"onnx"
HERE = {"target": "tensorrt-rtx", "version": "1.7.1.116", "gpu": "RTX A", "capability": 86}


def content(**changes: Any) -> dict[str, Any]:
    step = {
        "file": "step.plan", "sha256": sha256(PLAN).hexdigest(), "bytes": len(PLAN), "source": SOURCE,
        "weight_bytes": 100,
        "ranges": {"batch": {"minimum": 1, "optimum": 1, "maximum": 8}, "d0": {"minimum": 8, "optimum": 8, "maximum": 8},
                   "steps": {"minimum": 1, "optimum": 50, "maximum": 1000}},
    }  # fmt: skip
    return {
        "format": 1, "name": "model", "target": "tensorrt-rtx", "version": "1.7.1.116", "artifact": ARTIFACT,
        "precision": "fp16", "capabilities": [80, 86], "programs": {"step": step}, **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / PLANS).write_text(json.dumps(content()))
    (tmp_path / "step.plan").write_bytes(PLAN)
    return tmp_path


def test_the_command_has_what_was_asked_for() -> None:
    plans = manifest(
        batch="1:4", size="4,4,4:8,12,8:16,16,16", target="tensorrt", compatibility="ampere-plus"
    )
    assert plans.command() == (
        "`volcast build ARTIFACT --target tensorrt --precision fp16 --batch 1:4 --size 4,4,4:8,12,8:16,16,16 "
        "--compatibility ampere-plus --force`"
    )
    with pytest.raises(ValueError, match="batch"):
        manifest(batch="1:4; rm -r")


def manifest(**changes: Any) -> PlanManifest:
    return PlanManifest.model_validate(content(**changes))


def host(**changes: Any) -> Host:
    return Host(**(HERE | changes))


def check(plans: PlanManifest, artifact: str = ARTIFACT, **here: Any) -> None:
    check_plans(Path("engines"), plans, host(**here), artifact)


def test_whole_plans_of_this_gpu_are_read(folder: Path) -> None:
    plans = read_plans(folder)
    check_plans(folder, plans, host(), ARTIFACT)
    check_sizes(folder, plans, "step", {"batch": 8, "d0": 8, "other": 99})
    assert read_plan(folder, plans, "step", SOURCE) == PLAN
    assert plans.command() == (
        "`volcast build ARTIFACT --target tensorrt-rtx --precision fp16 --sm 80 --sm 86 --force`"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": "import os"}, "code Extra inputs are not permitted"),
        ({"format": 2}, "format Input should be less than or equal to 1"),
        ({"target": "other"}, "target Input should be"),
        ({"capabilities": []}, "capabilities Tuple should have at least 1 item"),
        ({"version": "1.7; rm"}, "version String should match pattern"),
        ({"programs": {"step": {"file": "../step.plan"}}}, "programs.step.file String should match pattern"),
        ({"programs": {"other": {}}}, "programs.other"),
    ],
)
def test_manifests_with_faults_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    (folder / PLANS).write_text(json.dumps(content(**changes)))
    with pytest.raises(
        ValueError, match=rf"^\[plans\] .*plans\.json: {message}.*; run `volcast build [^\n]*--force$"
    ):
        read_plans(folder)


def test_no_manifest_or_half_of_one(folder: Path) -> None:
    text = (folder / PLANS).read_text()
    (folder / PLANS).write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"^\[plans\] .*plans\.json: .*; run `volcast build "):
        read_plans(folder)
    (folder / PLANS).unlink()
    with pytest.raises(ValueError, match=r"^\[plans\] .* holds no plans\.json; run `volcast build "):
        read_plans(folder)


@pytest.mark.parametrize(
    ("plans", "here", "message"),
    [
        ({}, {"artifact": "c" * 64}, "was built from another export of model; run `volcast build ARTIFACT"),
        ({}, {"target": "tensorrt"}, "is for tensorrt-rtx, not tensorrt; run `volcast build"),
        ({}, {"version": "1.7.1.117"}, r"was built by tensorrt-rtx 1\.7\.1\.116, this is 1\.7\.1\.117; run"),
        (
            {},
            {"capability": 89},
            r"was built for compute capability 8\.0, 8\.6, this is RTX A \(8\.9\); run .* with --sm 89$",
        ),
        (
            {"target": "tensorrt", "gpu": "H100", "capabilities": [90]},
            {"target": "tensorrt", "gpu": "H200", "capability": 90},
            r"was built on H100, this is H200 \(9\.0\); run `volcast build .* --precision fp16 --force` here$",
        ),
        (
            {"target": "tensorrt", "gpu": "H100", "capabilities": [90]},
            {"target": "tensorrt", "gpu": "L4", "capability": 89},
            r"was built for compute capability 9\.0, this is L4 \(8\.9\); run .* here$",
        ),
        (
            {"target": "tensorrt", "gpu": "A", "compatibility": "ampere-plus"},
            {"target": "tensorrt", "gpu": "T4", "capability": 75},
            r"was built for 8\.0 and newer, this is T4 \(7\.5\); run .*--compatibility ampere-plus",
        ),
        (
            {"target": "tensorrt", "version": "10.12.0.36", "version_compatible": True},
            {"target": "tensorrt", "version": "11.0.0.114"},
            r"was built by tensorrt 10\.12\.0\.36, this is 11\.0\.0\.114; run .*--version-compatible",
        ),
        (
            {"target": "tensorrt", "version": "10.13.0.1", "version_compatible": True},
            {"target": "tensorrt", "version": "10.12.0.36"},
            r"was built by tensorrt 10\.13\.0\.1, this is 10\.12\.0\.36",
        ),
    ],
)
def test_stale_and_foreign_plans_are_refused(
    plans: dict[str, Any], here: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^\[plans\] engines {message}"):
        check(manifest(**plans), **here)


@pytest.mark.parametrize(
    ("plans", "here"),
    [
        ({"compatibility": "ampere-plus", "gpu": "A"}, {"gpu": "B", "capability": 120}),
        ({"compatibility": "same-capability", "gpu": "A"}, {"gpu": "B"}),
        ({"version": "10.12.0.36", "version_compatible": True}, {"version": "10.16.1.11"}),
        ({"gpu": "A"}, {"gpu": "A"}),
    ],
)
def test_what_compatible_plans_allow(plans: dict[str, Any], here: dict[str, Any]) -> None:
    base = {"target": "tensorrt", "version": "10.12.0.36"}
    check(manifest(**base | plans), **base | here)


def test_plans_that_are_cut_short_altered_missing_or_of_another_source(folder: Path) -> None:
    plans = read_plans(folder)
    path = folder / "step.plan"
    again = r"; run `volcast build ARTIFACT --target tensorrt-rtx .*--force`$"
    with pytest.raises(
        ValueError, match=r"^\[plans\] .*step\.plan was built from another step\.onnx" + again
    ):
        read_plan(folder, plans, "step", "d" * 64)
    path.write_bytes(PLAN[:100])
    with pytest.raises(ValueError, match=r"step\.plan has 100 of 170 bytes: it was cut short" + again):
        read_plan(folder, plans, "step", SOURCE)
    path.write_bytes(PLAN[:-1] + b"!")
    with pytest.raises(ValueError, match=r"step\.plan was altered" + again):
        read_plan(folder, plans, "step", SOURCE)
    path.unlink()
    with pytest.raises(ValueError, match=r"step\.plan is missing: No such file or directory" + again):
        read_plan(folder, plans, "step", SOURCE)
    with pytest.raises(ValueError, match=r"holds no decode" + again):
        read_plan(folder, plans, "decode", SOURCE)


def test_a_skeleton_is_checked_too(folder: Path) -> None:
    step = content()["programs"]["step"] | {
        "skeleton": "step.onnx",
        "skeleton_sha256": sha256(SKELETON).hexdigest(),
        "weights": [{"name": "w.fp16", "source": "w", "dtype": "float16"}],
    }
    plans = manifest(programs={"step": step})
    assert "--strip" in plans.command()
    (folder / "step.onnx").write_bytes(SKELETON)
    assert read_skeleton(folder, plans, "step") == SKELETON
    (folder / "step.onnx").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"step\.onnx was altered; run `volcast build .*--strip --force`"):
        read_skeleton(folder, plans, "step")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"batch": 9},
            r"batch=9: the plan in engines takes 1\.\.8; build with another --batch: `volcast build",
        ),
        ({"d0": 16}, r"d0=16: the plan in engines takes 8\.\.8; build with another --size: `volcast build"),
        ({"steps": 1001}, r"steps=1001: the plan in engines takes 1\.\.1000; give fewer steps"),
    ],
)
def test_sizes_that_a_profile_does_not_hold(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^\[step\] {message}"):
        check_sizes(Path("engines"), manifest(), "step", sizes)


def test_ranges_ascend() -> None:
    assert str(Range(minimum=4, optimum=8, maximum=16)) == "4:8:16"
    assert str(Range(minimum=8, optimum=8, maximum=8)) == "8"
    with pytest.raises(ValueError, match="8:4:16 is not ascending"):
        Range(minimum=8, optimum=4, maximum=16)
