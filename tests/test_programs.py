"""Programs are opened once for a shape, and a few shapes are kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import final

import numpy as np
import pytest

from volcast.runtime.artifact import read_artifact
from volcast.runtime.engine import Engine, Program
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.programs import KEPT, Programs
from volcast.runtime.spec import ProgramSpec


@final
class Counting(Engine):
    """ONNX Runtime that notes what it is asked to open."""

    name = "counting"
    threads = 1

    def __init__(self) -> None:
        self.opened: list[tuple[str, dict[str, int]]] = []
        self._engine = open_engine("onnxruntime", 1)

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        self.opened.append((path.name, dict(sizes)))
        return self._engine.open(path, program, sizes)


@pytest.fixture
def engine() -> Counting:
    return Counting()


@pytest.fixture
def programs(gaussian: Path, engine: Counting) -> Programs:
    return Programs(gaussian, read_artifact(gaussian), engine)


def decode(programs: Programs, d0: int) -> np.ndarray:
    return programs.call("decode", {"z": np.ones((1, 2, d0, 2, 2))})["image"]


def test_a_shape_is_opened_once_and_the_oldest_goes(programs: Programs, engine: Counting) -> None:
    for d0 in (2, 2, 4, 6, 2):
        assert decode(programs, d0).shape == (1, 1, 2 * d0, 4, 4)
    assert [sizes["d0"] for _, sizes in engine.opened] == [2, 4, 6]
    assert len(engine.opened) == KEPT
    decode(programs, 8)  # drops 4, the least recently used
    decode(programs, 2)
    decode(programs, 4)
    assert [sizes["d0"] for _, sizes in engine.opened] == [2, 4, 6, 8, 4]
    assert programs.open_seconds > 0


def test_only_the_axes_of_a_program_count(programs: Programs, engine: Counting) -> None:
    programs.call("prepare", {"context": np.ones((2, 1, 3)), "unrelated": np.ones(7)})
    assert engine.opened == [("prepare.onnx", {"batch": 2})]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("decode", {"z": np.ones((1, 2, 3, 2, 2))}, "d0=3: need 2..16 and a multiple of 2"),
        ("decode", {"z": np.ones((1, 3, 2, 2, 2))}, r"z has shape \(1, 3, 2, 2, 2\): need \(1, 2, 2, 2, 2\)"),
        ("decode", {"z": np.ones((2, 2))}, r"z has shape \(2, 2\): need \(2, 2, d0, d1, d2\)"),
        ("decode", {"z": np.ones((9, 2, 2, 2, 2))}, "batch=9"),
        ("decode", {}, "decode takes z, which nothing gives"),
        (
            "step",
            {"x": np.ones((2, 2, 2, 2, 2)), "row": np.ones((1, 2)), "constants": np.ones((1, 1))},
            "row has shape",
        ),
    ],
)
def test_wrong_shapes_open_nothing(programs: Programs, engine: Counting, name, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        programs.call(name, given)
    assert not engine.opened


def test_a_program_that_the_artifact_lacks(gaussian: Path, engine: Counting) -> None:
    spec = read_artifact(gaussian)
    rest = {name: program for name, program in spec.programs.items() if name != "encode"}
    programs = Programs(gaussian, spec.model_copy(update={"programs": rest}), engine)
    with pytest.raises(ValueError, match=r"\[encode\] gaussian has no encode program"):
        programs.call("encode", {"image": np.ones((1, 1, 4, 4, 4))})
