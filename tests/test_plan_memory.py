"""A memory limit on TensorRT's engines: foretold from real plans, kept on the driver's host form, told by `info`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from host_tensorrt import Device, host_engine
from onnx import numpy_helper

from volcast.__main__ import app
from volcast.export.tensorrt_network import PlanSettings, build_plan
from volcast.runtime.artifact import read_artifact
from volcast.runtime.engine import shapes
from volcast.runtime.pipeline import load
from volcast.runtime.plan_memory import FIXED, PlanMemory, PlannedProgram
from volcast.runtime.plans import PlanFile, Range, read_plans
from volcast.runtime.programs import bind
from volcast.runtime.slabs import SlabProgram
from volcast.runtime.tensorrt_library import open_library

pytest.importorskip("tensorrt_rtx_bindings")
TARGET, SIZE = "tensorrt-rtx", (4, 4, 4)


@pytest.fixture(scope="module")
def built(default_artifact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with plans for 8.6. Copy it before a change."""
    from volcast.export.to_tensorrt import build_tensorrt

    folder = tmp_path_factory.mktemp("built") / "hippocampus"
    shutil.copytree(default_artifact_folder, folder)
    build_tensorrt(
        folder,
        TARGET,
        capabilities=(86,),
        precision="fp32",
        batch=(1, 2),
        size=((4, 4, 4), (4, 4, 4), (8, 12, 8)),
    )
    return folder


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def relative(result: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(result.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def test_a_limit_is_kept_and_the_volume_is_the_same(
    built: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's word for what a plan needs is a stand-in; weights, buffers and their lives are the engine's own."""
    engine, spec = host_engine(built, TARGET, device, monkeypatch), read_artifact(built)
    memory = engine.limited(built, spec, 2**40)
    sizes = {"batch": 1, "steps": 1, **{f"d{axis}": size for axis, size in enumerate(SIZE)}}
    held = memory.held([(name, sizes) for name in ("schedule", "prepare", "step")])
    least, whole = int(memory.plan_slabs(sizes, 0).peak), memory.footprint("decode", sizes).held
    assert least < 0.5 * whole and device.live == 0  # plans that were asked are gone
    free = load(built, engine).sample(0, steps=1, size=SIZE)
    assert free.report is not None and free.report.decode_slabs == 0
    assert free.report.device_bytes == device.peak
    del engine
    engine, device.peak = host_engine(built, TARGET, device, monkeypatch), device.live
    limit = -(-(held + least) * 20 // 19)  # a twentieth is kept in reserve
    with pytest.raises(
        ValueError, match=rf"memory_limit={limit - 1}: decode of .* needs at least {limit} bytes"
    ):
        load(built, engine, memory_limit=limit - 1).sample(0, steps=1, size=SIZE)
    volume = load(built, engine, memory_limit=limit).sample(0, steps=1, size=SIZE)
    report = volume.report
    assert report is not None and report.decode_slabs > 15
    assert report.device_bytes == device.peak <= report.predicted_bytes <= limit
    # Without guidance the second branch's buffers, which are foretold, are not there.
    assert device.peak > 0.95 * report.predicted_bytes
    # float32, and sums in another order: the budget is far above it (some 1e-6).
    assert relative(volume.array, free.array) < 1e-4


def test_two_latents_are_decoded_one_by_one(
    built: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, spec = host_engine(built, TARGET, device, monkeypatch), read_artifact(built)
    z = np.random.default_rng(0).standard_normal((2, spec.latent_shape[0], 4, 4, 4)).astype(np.float32)
    whole = load(built, engine).decode(z)
    least = engine.limited(built, spec, 1).plan_slabs({"batch": 2, "d0": 4, "d1": 4, "d2": 4}, 0).peak
    images = load(built, engine, memory_limit=int(1.1 * least)).decode(z)
    assert images.shape == whole.shape and relative(images, whole) < 1e-4


def test_info_tells_what_the_builder_told(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, plans = built / "engines" / f"{TARGET}-sm86", read_plans(built / "engines" / f"{TARGET}-sm86")
    told = ["info", str(built), "--memory", "--engine", TARGET, "--json", "--size"]
    assert app([*told, "8,12,8"]) == 0
    rows = {row["program"]: row for row in json.loads(capsys.readouterr().out)}
    decode = plans.programs["decode"]
    buffers = 4 * (4 * 8 * 12 * 8 + 32 * 48 * 32)  # a latent of four channels, an image
    assert rows["decode"]["peak"] == decode.weight_bytes + (decode.scratch_bytes or 0) + buffers
    least = rows["decode in slabs, least"]
    assert least["slabs"] > 15 and least["peak"] < 0.5 * rows["decode"]["peak"]
    assert app([*told, "8,12,8", "--memory-limit", "1MiB"]) == 2
    assert re.search(r"memory_limit=1048576: decode of .* needs at least", capsys.readouterr().err)
    assert app([*told, "8,16,8"]) == 2
    assert f"d1=16: the plan in {place} takes 4..12; build with another --size" in capsys.readouterr().err
    assert app(["info", str(built), "--memory", "--engine", "tensorrt"]) == 2
    assert (
        f"has no plans for tensorrt; run `volcast build {built} --target tensorrt`" in capsys.readouterr().err
    )


@pytest.mark.parametrize("index", [7, 11, 13])
def test_slabs_of_some_rows_take_what_the_builder_says_of_them(
    default_artifact_folder: Path, tmp_path: Path, index: int
) -> None:
    """What is foretold of a quarter of the rows, from the plan for all of them, beside a plan for that quarter."""
    library, slabs = open_library(TARGET), read_artifact(default_artifact_folder).slabs
    assert slabs is not None
    program, segment = SlabProgram(slabs, (16, 24, 16)), slabs.segments[index]
    source = default_artifact_folder / segment.program.file

    def axes(rows: int) -> dict[str, int]:
        return bind("decode", segment.program, program.input_shapes(index, rows))

    def plan(rows: int) -> PlannedProgram:
        least, most = axes(program.step(index)), axes(rows)
        ranges = {axis: Range(minimum=least[axis], optimum=most[axis], maximum=most[axis]) for axis in most}
        settings = PlanSettings(capabilities=(86,), timing_cache=tmp_path / "none")
        content, scratch = build_plan(library, source, segment.program, ranges, settings, lambda *_: None)
        weights = sum(numpy_helper.to_array(one).nbytes for one in onnx.load(source).graph.initializer)
        file = PlanFile(
            file="decode.plan", sha256="0" * 64, bytes=len(content), source="0" * 64, ranges=ranges,
            weight_bytes=weights, scratch_bytes=scratch,
        )  # fmt: skip
        return PlannedProgram(source.stem, segment.program, default_artifact_folder, file)

    depth = program.depth(segment.value)
    whole, part, given = plan(depth), plan(depth // 4), shapes(segment.program, axes(depth // 4))
    around = part.file.weight_bytes + part.buffers(given)
    assert part.file.scratch_bytes is not None and part.file.scratch_bytes > 2**23
    assert (
        abs((whole.foretold(given, FIXED[TARGET]) + around) / (part.file.scratch_bytes + around) - 1) < 0.15
    )


def test_plans_without_the_segments_are_refused(built: Path, tmp_path: Path) -> None:
    folder = built / "engines" / f"{TARGET}-sm86"
    plans = read_plans(folder)
    programs = {name: plan for name, plan in plans.programs.items() if name != "decode_07"}
    with pytest.raises(
        ValueError, match=r"holds no decode_07; run `volcast build ARTIFACT --target tensorrt-rtx"
    ):
        PlanMemory(built, read_artifact(built), folder, plans.model_copy(update={"programs": programs}), None)
