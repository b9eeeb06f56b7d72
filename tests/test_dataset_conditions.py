"""Conditions of a dataset's samples: drawn by (seed, sample), from tables, refused in one line."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from volcast.runtime.artifact import read_artifact
from volcast.runtime.dataset_conditions import DatasetConditions, draw, listed, parse_dataset_conditions
from volcast.runtime.volume import Volume, centred_affine


def parse(artifact: Path, *texts: object) -> DatasetConditions:
    return parse_dataset_conditions(read_artifact(artifact), map(str, texts))


def test_drawn_numbers_are_uniform_and_independent() -> None:
    columns = [
        np.array([draw(seed, sample, name, 0, 1) for sample in range(4000)])
        for seed, name in ((0, "a"), (0, "b"), (1, "a"), (2**64 - 1, "a"))
    ]
    for column in columns:
        assert 0 <= column.min() and column.max() < 1
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    # The correlation of independent columns is N(0, 1/4000): 5 sigma.
    correlation = np.corrcoef([*columns, np.roll(columns[0], 1)])
    assert np.abs(correlation - np.eye(5)).max() < 5 / np.sqrt(4000)
    assert draw(7, 5, "a", -2, 3) == -2 + 5 * draw(7, 5, "a", 0, 1) and draw(7, 5, "a", 0.5, 0.5) == 0.5


def test_a_draw_depends_on_its_own_name_alone(gaussian: Path) -> None:
    one, two = (
        parse(gaussian, "anterior=uniform:0,1"),
        parse(gaussian, "posterior=uniform:0.2,0.3", "anterior=uniform:0,1", "ratio=0.5"),
    )
    assert two.own(4, 9)["anterior"] == one.own(4, 9)["anterior"]
    assert 0.2 <= two.own(4, 9)["posterior"] <= 0.3 and "ratio" not in two.own(4, 9)
    assert two.listed() == {
        "ratio": 0.5,
        "posterior": {"uniform": [0.2, 0.3]},
        "anterior": {"uniform": [0.0, 1.0]},
    }


@pytest.mark.parametrize("size", [2, 8])
def test_where_a_label_map_lies_is_part_of_the_dataset(size: int) -> None:
    array = np.ones((size, size, size), np.float32)
    here = Volume(array, centred_affine(array.shape, (1, 1, 1)), (1, 1, 1))
    there = Volume(array, here.affine + np.diag([0, 0, 0.5, 0]), (1, 1, 1))
    assert listed({"mask": here}) == json.loads(json.dumps(listed({"mask": here})))
    assert listed({"mask": here}) == listed({"mask": Volume(array.copy(), here.affine.copy(), (1, 1, 1))})
    assert listed({"mask": here}) != listed({"mask": there})


def test_datasets_whose_arrays_lie_nowhere_are_listed_as_ever() -> None:
    digest = hashlib.sha256(b"float64 (65,) " + bytes(8 * 65)).hexdigest()
    assert listed({"hint": np.zeros(65)}) == {"hint": {"shape": [65], "sha256": digest}}
    assert listed({"context": np.zeros(3), "anterior": 0.5}) == {"context": [0.0, 0.0, 0.0], "anterior": 0.5}


def test_tables(gaussian: Path, tmp_path: Path) -> None:
    rows = [{"anterior": 0.25, "posterior": 1.0}, {"anterior": 0.5}]
    (tmp_path / "a.csv").write_text("\ufeffanterior, posterior\n0.25,1\n0.5,\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.csv", "a.jsonl"):
        found = parse(gaussian, tmp_path / name, "ratio=0.5")
        assert [found.own(0, 0), found.own(0, 1)] == rows and found.constant == {"ratio": 0.5}
        found.check(read_artifact(gaussian), 0, 2)
        with pytest.raises(ValueError, match="2 rows for 3 samples"):
            found.check(read_artifact(gaussian), 0, 3)
    (tmp_path / "b.jsonl").write_text('{"context": [[0.1, 0.2, 0.3]]}\n')
    parse(gaussian, tmp_path / "b.jsonl").check(read_artifact(gaussian), 0, 1)
    (tmp_path / "b.csv").write_text("anterior\n0.5\n2\n")
    with pytest.raises(ValueError, match=r"anterior=2.0: need 0..1 \(sample 1\)"):
        parse(gaussian, tmp_path / "b.csv").check(read_artifact(gaussian), 0, 2)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["front=uniform:0,1"], "only a number is drawn; known: anterior, posterior, ratio"),
        (["context=uniform:0,1"], "only a number is drawn"),
        (["anterior=uniform:1,0"], "write uniform:a,b with a <= b"),
        (["anterior=uniform:0"], "write uniform:a,b"),
        (["anterior=uniform:0,nan"], "write uniform:a,b"),
        (["anterior=uniform:0,1", "anterior=uniform:0,1"], "anterior is given twice"),
        (["anterior=uniform:0,1", "anterior=0.5"], "anterior is given twice"),
        (["a.csv", "anterior=0.5"], "anterior is given twice"),
        (["a.csv", "b.csv"], "give one table"),
        (["no.csv"], "cannot read it"),
        (["words.csv"], "line 3: anterior='x' is not a number"),
        (["long.csv"], "line 2: not as many cells"),
        (["short.csv"], "line 2: not as many cells"),
        (["list.jsonl"], "line 1: need an object"),
        (["torn.jsonl"], "line 2 is not JSON"),
    ],
)
def test_refusals(gaussian: Path, tmp_path: Path, monkeypatch, texts: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "a.csv": "anterior\n0.5\n", "b.csv": "posterior\n0.5\n", "words.csv": "anterior\n0.5\nx\n",
        "long.csv": "anterior\n0.5,1\n", "short.csv": "anterior,posterior\n0.5\n", "list.jsonl": "[1]\n",
        "torn.jsonl": '{}\n{"anterior"',
    }.items():  # fmt: skip
        Path(name).write_text(content)
    with pytest.raises(ValueError, match=r"^\[condition\]") as caught:
        parse(gaussian, *texts)
    assert message in str(caught.value) and "\n" not in str(caught.value)
