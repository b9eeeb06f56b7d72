"""runtime/captured: buffers, captures and the loop of one graph a step, on the driver's host form."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from host_network import HostEngine, OrtNetwork

from volcast import _core
from volcast.runtime.artifact import read_artifact
from volcast.runtime.captured import CapturedProgram, CapturedStep, Tensor, device_errors
from volcast.runtime.engine import Program
from volcast.runtime.pipeline import Model, load

SIZES = {"batch": 2, "d0": 4, "d1": 6, "d2": 4}


@pytest.fixture(scope="module")
def oracle(gaussian: Path) -> Model:
    return load(gaussian, "onnxruntime", 1)


@pytest.fixture
def model(gaussian: Path) -> Model:
    return load(gaussian, HostEngine())


def network(gaussian: Path, name: str) -> OrtNetwork:
    spec = read_artifact(gaussian)
    program = spec.programs[name]  # type: ignore[index]
    return OrtNetwork(_core.Driver.host(), gaussian / program.file, program, SIZES)


@pytest.fixture
def decode(gaussian: Path) -> Program:
    return CapturedProgram(_core.Driver.host(), network(gaussian, "decode"), "decode")


def test_a_program_s_outputs_are_the_caller_s(decode: Program, oracle: Model) -> None:
    generator = np.random.default_rng(0)
    latents = [generator.standard_normal((2, 2, 4, 6, 4)).astype(np.float32) for _ in range(2)]
    first = decode({"z": latents[0]})["image"]
    before = first.copy()
    second = decode({"z": latents[1]})["image"]
    np.testing.assert_array_equal(first, before)
    assert not np.shares_memory(first, second)
    scale = np.float32(oracle.spec.scale_factor)
    for z, image in zip(latents, (first, second), strict=True):
        np.testing.assert_array_equal(image, oracle.decode(z * scale))


@pytest.mark.parametrize(
    "z",
    [np.zeros((1, 2, 4, 6, 4), np.float32), np.zeros((2, 2, 4, 6, 4)), np.zeros((2, 2, 4, 4, 6), np.float32)],
)
def test_other_shapes_and_types_are_refused(decode: Program, z: np.ndarray) -> None:
    with pytest.raises(
        ValueError, match=r"^\[decode\] z is float\d\d \(.*\): need float32 \(2, 2, 4, 6, 4\)$"
    ):
        decode({"z": z})


@pytest.mark.parametrize("capturable", [True, False])
def test_a_program_runs_once_a_call(gaussian: Path, capturable: bool) -> None:
    one = network(gaussian, "decode")
    one.capturable = capturable
    program = CapturedProgram(_core.Driver.host(), one, "decode")
    before = one.runs
    for _ in range(3):
        program({"z": np.ones((2, 2, 4, 6, 4), np.float32)})
    assert one.runs == before + 3
    assert program.bytes == 4 * 2 * (2 * 4 * 6 * 4 + 8 * 12 * 8)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 7},
        {"steps": 5, "guidance": 2.0},
        {"steps": 6, "scheduler": "pndm"},
        {"steps": 5, "scheduler": "ddpm", "guidance": 0.5},
        {"steps": 5, "scheduler": "dpm-solver++"},
        {"steps": 1},
    ],
)
def test_the_captured_loop_gives_the_host_loop_s_bits(model: Model, oracle: Model, settings: dict) -> None:
    arguments = {"batch": 2, "condition": {"anterior": 0.9}, **settings}
    for ours, theirs in zip(
        model.sample_many(3, 5, **arguments), oracle.sample_many(3, 5, **arguments), strict=True
    ):
        np.testing.assert_array_equal(ours.array, theirs.array)
        assert ours.report is not None and ours.report.network_seconds > 0


def test_a_captured_step_serves_every_request_of_its_shape(model: Model, oracle: Model) -> None:
    """Conditions, seeds, plans and their lengths change between requests; the graph does not."""
    for seed, steps, anterior in ((1, 4, 0.1), (2, 9, 0.9), (1, 4, 0.1)):
        arguments = {"steps": steps, "condition": {"anterior": anterior}}
        np.testing.assert_array_equal(
            model.sample(seed, **arguments).array, oracle.sample(seed, **arguments).array
        )


def test_steps_are_told_and_a_raise_stops_them(model: Model) -> None:
    told: list[tuple[int, int]] = []
    whole = model.sample(6, steps=4, on_step=lambda *place: told.append(place))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def cancel(done: int, total: int) -> None:
        told.append((done, total))
        if done == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        model.sample(6, steps=200, on_step=cancel)
    assert told[4:] == [(1, 200), (2, 200)]
    np.testing.assert_array_equal(model.sample(6, steps=4).array, whole.array)


def test_previews_are_those_of_their_steps(model: Model, oracle: Model) -> None:
    found: list[dict[int, np.ndarray]] = [{}, {}]
    for one, images in zip((model, oracle), found, strict=True):
        one.sample(
            3, steps=6, preview_every=2, on_preview=lambda step, x, images=images: images.update({step: x})
        )
    assert sorted(found[0]) == sorted(found[1]) == [2, 4, 6]
    for step, image in found[0].items():
        np.testing.assert_array_equal(image, found[1][step])


def test_values_that_are_not_finite_are_named(model: Model) -> None:
    with pytest.raises(
        ValueError, match=r"^\[loop\] step 0 \(t=\d+\), sample 0: .* not finite; check the weights"
    ):
        model.sample(0, steps=50, condition={"context": [[1e38, 0.0, 1e38]]})
    assert np.isfinite(model.sample(0, steps=2).array).all()


def test_a_step_that_cannot_be_captured_runs_call_by_call(
    gaussian: Path, oracle: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OrtNetwork, "capturable", False)
    model = load(gaussian, HostEngine())
    np.testing.assert_array_equal(model.sample(2, steps=3).array, oracle.sample(2, steps=3).array)
    with pytest.raises(ValueError, match=r"^\[step\] the network cannot be captured$"):
        CapturedStep(_core.Driver.host(), network(gaussian, "step"), False)


def test_device_errors_are_one_line() -> None:
    driver = _core.Driver.host()
    error = driver.error("allocate memory", 2)
    with (
        pytest.raises(ValueError, match=r"^\[step\] \[host\] allocate memory: .*smaller size or batch"),
        device_errors("step"),
    ):
        raise error
    with (
        pytest.raises(ValueError, match=r"^\[step\] \[host\] allocate memory: CUDA_ERROR_OUT_OF_MEMORY"),
        device_errors("step"),
    ):
        _core.DeviceMemory(driver, 2**62)
    assert Tensor(shape=(2, 3), dtype="int64").bytes == 48


def test_work_in_a_capture_runs_at_each_launch_and_not_before() -> None:
    driver = _core.Driver.host()
    stream = _core.Stream(driver)
    memory, pinned = _core.DeviceMemory(driver, 16), [_core.PinnedMemory(driver, 16) for _ in range(2)]
    source, result = (np.frombuffer(memoryview(one), np.float32) for one in pinned)
    source[:] = [1, 2, 3, 4]
    stream.begin_capture()
    with pytest.raises(_core.DeviceError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        stream.synchronize()
    stream.copy(memory, pinned[0])
    stream.copy(pinned[1], memory)
    graph = stream.end_capture()
    executable = _core.Executable(driver, [graph.handle])
    stream.synchronize()
    assert not result.any()
    for factor in (1, 5):
        source *= factor
        executable.launch(stream)
        stream.synchronize()
        np.testing.assert_array_equal(result, source)
    with pytest.raises(_core.DeviceError, match="CUDA_ERROR_INVALID_VALUE"):
        stream.end_capture()


def test_the_update_refuses_what_does_not_fit() -> None:
    x, row, out = (np.zeros(shape, np.float32) for shape in ((2, 4), (2, 3), (2, 4)))
    with pytest.raises(ValueError, match=r"^\[LatentUpdate\] outs: got 0: need one, or two with guidance"):
        _core.LatentUpdate(x, row, [])
    with pytest.raises(
        ValueError, match=r"^\[LatentUpdate\] row: got float32 \[1, 3\], wanted .*float32 \[2, "
    ):
        _core.LatentUpdate(x, row[:1], [out])
    with pytest.raises(ValueError, match=r"^\[LatentUpdate\] outs: got float64 \[2, 4\], wanted"):
        _core.LatentUpdate(x, row, [out.astype(np.float64)])  # type: ignore[list-item]
    update = _core.LatentUpdate(x, row, [out])
    schedule = _core.linear_beta(10)
    plan = _core.make_ddim(schedule, _core.Steps(2), _core.Prediction.EPSILON)
    one = np.zeros(2, np.uint64)
    for rows, seeds, guidance, message in [
        (np.zeros((1, 3), np.float32), one, None, "rows: got 3 values, wanted 2 rows of 3"),
        (np.zeros((2, 3), np.float32), one[:1], None, "seeds, samples: got 1 and 1, wanted 2"),
        (np.zeros((2, 3), np.float32), one, 2.0, "guidance: need it with two outputs"),
        (np.zeros((2, 3), np.float32), one, np.nan, "guidance=nan: need a finite number"),
    ]:
        with pytest.raises(ValueError, match=message):
            update.start(plan, rows, seeds, seeds, guidance)


def test_ctrl_c(gaussian: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from host_network import HostEngine
from volcast.runtime.pipeline import load
model = load({str(gaussian)!r}, HostEngine())
def on_step(done, total):
    if done == 1:
        print("running", flush=True)
try:
    model.sample(0, steps=1000, scheduler="ddpm", on_step=on_step, size=(16, 16, 16))
    print("finished")
except KeyboardInterrupt:
    print("stopped", model.sample(0, steps=2).array.any())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "stopped True\n"
