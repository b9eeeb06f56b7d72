"""Conditions as typed."""

from pathlib import Path

import numpy as np
import pytest

from volcast.runtime.artifact import read_artifact
from volcast.runtime.condition_text import parse_conditions
from volcast.runtime.spec import ArtifactSpec


@pytest.fixture
def spec(gaussian: Path) -> ArtifactSpec:
    return read_artifact(gaussian)


def test_numbers_arrays_and_files(spec: ArtifactSpec, tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.arange(3.0)[None])
    assert parse_conditions(spec, ["anterior=0.5", " posterior = 1e-1"]) == {
        "anterior": 0.5,
        "posterior": 0.1,
    }
    np.testing.assert_array_equal(parse_conditions(spec, ["context=1,2,3"])["context"], [[1, 2, 3]])
    np.testing.assert_array_equal(
        parse_conditions(spec, [f"context=@{tmp_path}/c.npy"])["context"], [[0, 1, 2]]
    )
    np.testing.assert_array_equal(parse_conditions(spec, ["context=1,2"])["context"], [1, 2])  # refused later


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["anterior"], r"write name=number,.* or name=@FILE \(.npy, .nii.gz\)"),
        (["=1"], "write name=number"),
        (["anterior="], "write name=number"),
        (["anterior=1", "anterior=2"], "given twice"),
        (["anterior=a"], "not a number"),
        (["context=1,,2"], "not a number"),
        (["context=@missing.npy"], "cannot read it"),
    ],
)
def test_what_cannot_be_read(spec: ArtifactSpec, texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_conditions(spec, texts)
    assert "\n" not in str(error.value)


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def test_a_pickle_is_never_run(spec: ArtifactSpec, tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([Touch(tmp_path / "touched")], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=np.ones(2))
    for name in ("evil.npy", "several.npz"):
        with pytest.raises(ValueError, match="cannot read it"):
            parse_conditions(spec, [f"context=@{tmp_path / name}"])
    assert not (tmp_path / "touched").exists()
