"""The engines: one protocol, the same numbers, files that are not what the manifest says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from volcast.runtime import engine_auto
from volcast.runtime.artifact import read_artifact
from volcast.runtime.engine import Engine
from volcast.runtime.engine_auto import INSTALL, open_engine, physical_cores
from volcast.runtime.spec import ProgramSpec


@pytest.fixture(params=["openvino", "onnxruntime"])
def engine(request: pytest.FixtureRequest) -> Engine:
    pytest.importorskip(request.param)
    return open_engine(request.param, 1)


@pytest.fixture
def step(gaussian: Path) -> ProgramSpec:
    return read_artifact(gaussian).programs["step"]


SIZES = {"batch": 2, "d0": 4, "d1": 2, "d2": 6}


def inputs(seed: int) -> dict[str, np.ndarray]:
    normal = np.random.default_rng(seed).standard_normal
    shapes = {"x": (2, 2, 4, 2, 6), "row": (2, 2), "constants": (2, 1)}
    return {name: normal(shape).astype(np.float32) for name, shape in shapes.items()}


def expected(given: dict[str, np.ndarray]) -> np.ndarray:
    k, c = (given["row"][:, i].astype(np.float64).reshape(2, 1, 1, 1, 1) for i in (0, 1))
    return given["x"] * k + c * given["constants"].reshape(2, 1, 1, 1, 1)


def test_a_program_computes_what_its_file_says(engine: Engine, gaussian: Path, step: ProgramSpec) -> None:
    program = engine.open(gaussian / "step.onnx", step, SIZES)
    given = inputs(0)
    # Two products and a sum, each rounded once: 2 half-ulps of each product's magnitude, 1 more of the sum's.
    size = np.abs(given["x"]).max() * np.abs(given["row"]).max() * 2 + np.abs(given["row"]).max() * 3
    np.testing.assert_allclose(program(given)["out"], expected(given), atol=3 * 2**-24 * size)


def test_outputs_belong_to_the_caller(engine: Engine, gaussian: Path, step: ProgramSpec) -> None:
    program = engine.open(gaussian / "step.onnx", step, SIZES)
    first = program(inputs(1))["out"]
    kept = first.copy()
    program(inputs(2))
    np.testing.assert_array_equal(first, kept)
    first += 1  # the caller may write to it


def test_inputs_may_be_read_only(engine: Engine, gaussian: Path, step: ProgramSpec) -> None:
    given = inputs(3)
    for array in given.values():
        array.flags.writeable = False
    program = engine.open(gaussian / "step.onnx", step, SIZES)
    np.testing.assert_array_equal(program(given)["out"], program(inputs(3))["out"])


def test_a_file_that_is_no_onnx(engine: Engine, tmp_path: Path, gaussian: Path, step: ProgramSpec) -> None:
    whole = (gaussian / "step.onnx").read_bytes()
    for data in (b"", b"nonsense" * 20, whole[: len(whole) // 2]):
        (tmp_path / "step.onnx").write_bytes(data)
        with pytest.raises(ValueError, match="cannot open step.onnx.*volcast export") as error:
            engine.open(tmp_path / "step.onnx", step, SIZES)
        assert "\n" not in str(error.value)


def test_another_program_than_the_manifest_s(engine: Engine, gaussian: Path, step: ProgramSpec) -> None:
    with pytest.raises(
        ValueError, match=r"prepare.onnx takes context \(rank 3\), the manifest says x \(rank 5\)"
    ):
        engine.open(gaussian / "prepare.onnx", step, SIZES)


def test_auto_takes_the_fastest_installed_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    assert open_engine().name == "openvino"
    monkeypatch.setattr(engine_auto, "find_spec", lambda name: None if name == "openvino" else object())
    assert open_engine().name == "onnxruntime"
    monkeypatch.setattr(engine_auto, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="none is installed; pip install"):
        open_engine()
    with pytest.raises(ValueError, match=r"openvino is not installed; pip install 'volcast\[openvino\]'"):
        open_engine("openvino")


@pytest.mark.parametrize(
    ("name", "threads", "message"),
    [
        ("tpu", None, "need one of auto, cuda, .*openvino, onnxruntime"),
        ("auto", 0, r"threads=0: need 1\.\.1024"),
    ],
)
def test_bad_choices(name: str, threads: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_engine(name, threads)


def test_threads_default_to_the_cores_the_process_may_use() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from volcast.runtime.engine_auto import open_engine; print(open_engine('onnxruntime').threads)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert 1 <= physical_cores() <= 4096


@pytest.mark.parametrize("name", INSTALL)
def test_opening_an_engine_reaches_for_no_network(name: str) -> None:
    pytest.importorskip(name)
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): print('network', a); raise OSError('refused')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        f"from volcast.runtime.engine_auto import open_engine; open_engine({name!r})\n"
        "print(*[m for m in sys.modules if m.startswith('openvino_telemetry')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
