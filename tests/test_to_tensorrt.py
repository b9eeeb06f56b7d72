"""`volcast build --target tensorrt-rtx`, for real and without a GPU; what needs one is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch

from volcast.__main__ import app
from volcast.export.tensorrt_strip import write_skeleton
from volcast.export.tensorrt_types import typed
from volcast.export.to_tensorrt import build_tensorrt
from volcast.runtime.artifact import MANIFEST, read_artifact
from volcast.runtime.plans import (
    PLANS,
    Host,
    check_plans,
    planned_programs,
    read_plan,
    read_plans,
    source_digest,
)
from volcast.runtime.refit import WEIGHTS, write_weights
from volcast.runtime.spec import Precision
from volcast.runtime.tensorrt_library import Library, open_library

pytest.importorskip("tensorrt_rtx_bindings")
MODERN = (80, 86, 89, 120, 121)
NETWORKS = ["hippocampus", "brats_3d", "maisi_rflow"]
MALFORMED = 32
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def library() -> Library:
    return open_library("tensorrt-rtx")


@pytest.fixture
def artifact(gaussian: Path, tmp_path: Path) -> Path:
    """The small artifact of the closed form, to build in."""
    return Path(shutil.copytree(gaussian, tmp_path / "gaussian"))


@pytest.mark.slow
@pytest.mark.parametrize("capabilities", [(75,), MODERN], ids=["turing", "modern"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_program_of_the_networks(
    network: str,
    capabilities: tuple[int, ...],
    library: Library,
    zoo_artifact: Any,
    default_artifact_folder: Path,
    tmp_path: Path,
) -> None:
    """Step with and without conditions, decode and encode: parsed, built for every device, read back, known by header."""
    folder = default_artifact_folder if network == "hippocampus" else zoo_artifact(network)
    told: list[tuple[str, str, int, int]] = []
    place, built = build_tensorrt(
        folder, "tensorrt-rtx", tmp_path / "plans", capabilities=capabilities, precision=Precision.FP16,
        progress=lambda *one: told.append(one),
    )  # fmt: skip
    spec = read_artifact(folder)
    assert spec.slabs is not None
    assert list(built.programs) == [
        *(name for name in ("schedule", "prepare", "step", "decode", "encode") if name in spec.programs),
        *(f"decode_{number:02d}" for number in range(len(spec.slabs.segments))),
    ]
    assert {one[0] for one in told} == set(built.programs)
    assert all(0 <= done <= total for _, _, done, total in told)
    assert sorted(path.name for path in place.iterdir()) == sorted(
        [PLANS, *(plan.file for plan in built.programs.values())]
    )
    assert read_plans(place) == built
    for capability in capabilities:
        here = Host(target="tensorrt-rtx", version=library.version, gpu="any", capability=capability)
        check_plans(place, built, here, sha256((folder / MANIFEST).read_bytes()).hexdigest())
    runtime = library.trt.Runtime(library.log)
    for name, program in planned_programs(spec).items():
        plan = read_plan(place, built, name, source_digest(spec, name))
        weights = sum(
            one.const_value.nbytes for one in onnx_ir.load(folder / program.file).graph.initializers.values()
        )
        # The weights are in it, in half precision or wider; and it is a plan by its own header.
        assert len(plan) > 0.45 * weights
        assert 0.45 * weights < built.programs[name].weight_bytes <= 1.01 * weights
        assert (built.programs[name].scratch_bytes or 0) > 0
        assert runtime.get_engine_validity(plan)[1] & MALFORMED == 0
        assert runtime.get_engine_validity(b"?" * len(plan))[1] & MALFORMED
    batch, size = built.programs["step"].ranges["batch"], spec.latent_shape[1:]
    assert (batch.minimum, batch.optimum, batch.maximum) == (1, 1, 8)
    assert [str(built.programs["decode"].ranges[f"d{i}"]) for i in range(3)] == [str(one) for one in size]


@needs_no_gpu
def test_loading_needs_the_device(artifact: Path, library: Library) -> None:
    place, built = build_tensorrt(artifact, "tensorrt-rtx", capabilities=(86,), precision=Precision.FP32)
    assert place == artifact / "engines" / "tensorrt-rtx-sm86"
    plan = read_plan(place, built, "step", source_digest(read_artifact(artifact), "step"))
    with pytest.raises(ValueError, match=r"^\[tensorrt-rtx\] cannot load the plan: .*[Cc][Uu][Dd][Aa]"):
        library.deserialize(plan, False)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_and_sizes(
    precision: str, default_artifact_folder: Path, tmp_path: Path, library: Library
) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(default_artifact_folder, folder)
    place, built = build_tensorrt(
        folder, "tensorrt-rtx", capabilities=(89,), precision=precision, batch=(1, 1), size=((4, 4, 4),) * 3
    )
    assert built.precision.value == precision and built.batch == "1:1" and built.size == "4,4,4"
    assert str(built.programs["encode"].ranges["o0"]) == "16"
    assert place.name == "tensorrt-rtx-sm89"


def test_ranges_and_the_default_folder(artifact: Path, library: Library) -> None:
    place, built = build_tensorrt(
        artifact,
        "tensorrt-rtx",
        batch=(1, 4),
        size=((2, 2, 2), (4, 6, 4), (16, 16, 16)),
        precision=Precision.BF16,
    )
    assert place == artifact / "engines" / "tensorrt-rtx"
    assert built.capabilities == MODERN
    assert {name: str(one) for name, one in built.programs["decode"].ranges.items()} == {
        "batch": "1", "d0": "2:4:16", "d1": "2:6:16", "d2": "2:4:16"
    }  # fmt: skip
    assert {name: str(one) for name, one in built.programs["step"].ranges.items()} == {
        "batch": "1:1:4", "d0": "2:4:16", "d1": "2:6:16", "d2": "2:4:16"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"capabilities": (75,), "precision": "fp32"},
            "--sm 75 --precision fp32: TensorRT-RTX has no such products",
        ),
        (
            {"capabilities": (75,), "precision": "bf16"},
            "--sm 75 --precision bf16: TensorRT-RTX has no such products",
        ),
        ({"capabilities": (75, 86)}, "--sm 75 with others: Turing takes plans of its own"),
        (
            {"capabilities": (90,)},
            r"--sm 90: tensorrt-rtx .* builds for 75, 80, 86, 89, 120, 121; use --target tensorrt",
        ),
        (
            {"compatibility": "ampere-plus"},
            "--compatibility and --version-compatible are for --target tensorrt",
        ),
        ({"version_compatible": True}, "--compatibility and --version-compatible are for --target tensorrt"),
        ({"batch": (1, 99)}, "batch=99: need 1..4"),
        ({"size": ((4, 4, 3),) * 3}, "d2=3: need 2..16 and a multiple of 2"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    artifact: Path, arguments: dict[str, Any], message: str
) -> None:
    before = sorted(artifact.rglob("*"))
    with pytest.raises(ValueError, match=rf"^\[build\] {message}"):
        build_tensorrt(artifact, "tensorrt-rtx", **arguments)
    assert sorted(artifact.rglob("*")) == before


def test_a_tensor_of_two_billion_elements_is_predicted(default_artifact_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^\[build\] decode: \S+ would have \d+ elements .*fewer than 2\^31"
    ):
        build_tensorrt(
            default_artifact_folder,
            "tensorrt-rtx",
            tmp_path / "plans",
            batch=(1, 1),
            size=((128, 128, 128),) * 3,
        )
    assert not list(tmp_path.iterdir())


def test_ctrl_c_stops_the_build_and_leaves_nothing(default_artifact_folder: Path, tmp_path: Path) -> None:
    after: list[str] = []
    sent = False

    def interrupt(program: str, phase: str, done: int, total: int) -> None:
        nonlocal sent
        if sent:
            after.append(phase)
        elif program == "prepare" and phase == "Cloning network graph" and done > 3:
            sent = True
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_tensorrt(
            default_artifact_folder, "tensorrt-rtx", tmp_path / "plans", capabilities=(86,), size=((4, 4, 4),) * 3,
            progress=interrupt,
        )  # fmt: skip
    assert sent and not list(tmp_path.iterdir())
    assert "Computing profile costs" not in after  # the last phase, a whole build's


def test_a_folder_is_replaced_only_if_it_holds_plans(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = [
        "build",
        str(artifact),
        "--target",
        "tensorrt-rtx",
        "--sm",
        "8.6",
        "--precision",
        "fp32",
        "--json",
    ]
    assert app(build) == 0
    manifest = json.loads(capsys.readouterr().out)
    place = artifact / "engines" / "tensorrt-rtx-sm86"
    assert manifest == json.loads((place / PLANS).read_text())
    assert app(build) == 2
    assert "exists: remove it, choose another name, or pass --force" in capsys.readouterr().err
    assert app([*build[:-1], "--force"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:-1]] == ["schedule", "prepare", "step", "decode", "encode"]
    assert out[-1].startswith(f"{place}: gaussian in fp32 by tensorrt-rtx ") and out[-1].endswith("for 8.6")
    (place / PLANS).unlink()
    assert app([*build, "--force"]) == 2
    assert "holds no plans.json, something else: it is not replaced" in capsys.readouterr().err
    assert (place / "step.plan").is_file()


@needs_no_gpu
def test_stripping_needs_the_gpu_and_leaves_nothing(artifact: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^\[build\] tensorrt-rtx .* cannot build \w+\.onnx: .*; --strip needs the GPU"
    ):
        build_tensorrt(artifact, "tensorrt-rtx", capabilities=(86,), precision=Precision.FP32, strip=True)
    assert not (artifact / "engines").exists() or not list((artifact / "engines").iterdir())


@pytest.mark.parametrize("precision", list(Precision))
def test_a_skeleton_and_the_artifact_make_the_typed_program(
    default_artifact_folder: Path, tmp_path: Path, precision: Precision, library: Library
) -> None:
    """What a stripped plan is built from and what is put into it when it is loaded are the same bytes."""
    source = default_artifact_folder / "prepare.onnx"
    model = onnx_ir.load(source)
    typed(model, precision)
    whole = {name: one.const_value.tobytes() for name, one in model.graph.initializers.items()}
    weights = write_skeleton(model, tmp_path / "prepare.onnx")
    assert weights and (tmp_path / "prepare.onnx").stat().st_size < 0.2 * source.stat().st_size
    built_from = (tmp_path / WEIGHTS).read_bytes()
    write_weights(tmp_path / WEIGHTS, weights, source)
    assert (tmp_path / WEIGHTS).read_bytes() == built_from
    again = onnx_ir.load(tmp_path / "prepare.onnx").graph.initializers
    assert {name: one.const_value.tobytes() for name, one in again.items()} == whole
    network = library.network(library.trt.Builder(library.log))
    assert library.trt.OnnxParser(network, library.log).parse_from_file(str(tmp_path / "prepare.onnx"))
    with pytest.raises(ValueError, match=r"^\[plans\] schedule\.onnx lacks weight.*; build the plans again"):
        write_weights(tmp_path / WEIGHTS, weights, default_artifact_folder / "schedule.onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "tensorrt-rtx", "--sm", "ampere"], "--sm 'ampere': need a compute capability"),
        (["--target", "tensorrt-rtx", "--batch", "many"], "--batch 'many': need SMALLEST:LARGEST"),
        (["--target", "tensorrt-rtx", "--size", "8x8"], "--size '8x8': need latent sizes"),
        (
            ["--target", "cuda", "--strip"],
            "--compatibility, --version-compatible and --strip are for --target tensorrt",
        ),
        (["--target", "cubin", "--sm", "87", "--batch", "1:8"], "--batch '1:8': need one number for cubins"),
    ],
)
def test_bad_arguments(
    gaussian: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app(["build", str(gaussian), *arguments]) == 2
    assert f"volcast: [build] {message}" in capsys.readouterr().err
