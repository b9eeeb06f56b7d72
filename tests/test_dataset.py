"""The dataset's folder: nothing is lost and nothing is there twice, wherever a run was killed."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from volcast.runtime.dataset import Dataset, open_dataset
from volcast.runtime.dataset_manifest import Entry, check_dataset, read_manifest, volume_name

SETTINGS = {"seed": 3, "steps": 5}


def publish(dataset: Dataset, index: int) -> bool:
    content = f"volume {index}".encode() * (1 + index)
    part = dataset.parts / f"part{index}"
    part.write_bytes(content)
    entry = Entry(
        index=index, seed=3, sample=index, conditions={"a": 0.5}, file=volume_name(index), shape=(4, 6, 4),
        sha256=hashlib.sha256(content).hexdigest(), bytes=len(content),
    )  # fmt: skip
    return dataset.publish(entry, part)


def make(folder: Path, indices: Sequence[int]) -> None:
    with open_dataset(folder, SETTINGS) as dataset:
        assert all(publish(dataset, index) for index in indices)


def indices(folder: Path) -> list[int]:
    return [entry.index for entry, _ in read_manifest(folder)]


def test_a_dataset_is_taken_up(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    make(folder, [0, 1001, 2])
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "dataset.json", "manifest.jsonl", "shard-00000", "shard-00001"]  # fmt: skip
    assert json.loads((folder / "dataset.json").read_text()) == SETTINGS
    with open_dataset(folder, SETTINGS) as dataset:
        assert dataset.done == {0, 2, 1001} and dataset.dropped == 0
        before = (folder / "manifest.jsonl").read_bytes()
        assert not publish(dataset, 2) and publish(dataset, 1)
        assert list(dataset.parts.iterdir()) == []
    assert (folder / "manifest.jsonl").read_bytes().startswith(before) and indices(folder) == [0, 1001, 2, 1]
    found = check_dataset(folder)
    assert (found.intact, found.missing, found.altered, found.unlisted) == (4, (), (), ())


def test_a_line_cut_off_anywhere_does_not_count(tmp_path: Path) -> None:
    make(tmp_path, [0, 1, 2])
    whole = (tmp_path / "manifest.jsonl").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for length in [*range(last, len(whole), 16), len(whole) - 1]:
        (tmp_path / "manifest.jsonl").write_bytes(whole[:length])
        assert check_dataset(tmp_path).unlisted == (volume_name(2),)
        with open_dataset(tmp_path, SETTINGS) as dataset:
            assert dataset.done == {0, 1}
            assert publish(dataset, 2)
        assert (tmp_path / "manifest.jsonl").read_bytes() == whole


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_dataset import SETTINGS, open_dataset, publish

def run(folder, moment):
    left = moment
    def trace(frame, event, argument):
        nonlocal left
        if Path(frame.f_code.co_filename).name != "dataset.py":
            return None
        if event in ("line", "return"):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return trace
    sys.settrace(trace)
    with open_dataset(folder, SETTINGS) as dataset:
        for index in range(2):
            if index not in dataset.done:
                publish(dataset, index)
    sys.settrace(None)

moment = 0
while True:
    folder = Path(sys.argv[2]) / f"killed {moment}"
    child = os.fork()
    if child == 0:
        run(folder, moment)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    moment += 1
print(moment)
"""


def test_killed_before_any_line_of_the_code_it_goes_on(tmp_path: Path) -> None:
    """A first run is killed before line 0, 1, 2, ... of dataset.py that it executes, until one comes through."""
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    moments = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert moments > 50  # it does trace
    half = 0
    for moment in range(moments):
        folder = tmp_path / f"killed {moment}"
        with open_dataset(folder, SETTINGS) as dataset:
            half += dataset.done == {0}
            for index in {0, 1} - dataset.done:
                assert publish(dataset, index)
        assert sorted(indices(folder)) == [0, 1]
        found = check_dataset(folder)
        assert (found.intact, found.missing, found.altered, found.unlisted) == (2, (), (), ())
        assert not [name for name in os.listdir(folder) if name.startswith((".tmp-", ".parts-"))]
    assert half > 0


def test_a_file_that_is_gone_or_short_is_made_again(tmp_path: Path) -> None:
    make(tmp_path, [0, 1, 2, 3])
    (tmp_path / volume_name(1)).unlink()
    (tmp_path / volume_name(2)).write_bytes(b"short")
    assert check_dataset(tmp_path).missing == (volume_name(1),)
    assert check_dataset(tmp_path).altered == (volume_name(2),)
    with open_dataset(tmp_path, SETTINGS) as dataset:
        assert dataset.done == {0, 3} and dataset.dropped == 2 and indices(tmp_path) == [0, 3]
        assert publish(dataset, 1) and publish(dataset, 2)
    assert check_dataset(tmp_path).intact == 4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: [lines[0], b"{}\n", lines[1]], "line 2: index Field required"),
        (lambda lines: [lines[0][:20] + b"\n", lines[1]], "line 1: "),
        (lambda lines: [lines[0], lines[0]], "line 2: volume 0 stands twice"),
        (
            lambda lines: [lines[0].replace(b"shard-00000", b"../elsewhe")],
            "line 1: volume 0 is not ../elsewhe",
        ),
    ],
)
def test_an_altered_manifest_is_named_and_kept(tmp_path: Path, edit, message: str) -> None:
    make(tmp_path, [0, 1])
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(b"".join(edit(manifest.read_bytes().splitlines(keepends=True))))
    before = manifest.read_bytes()
    for read in (lambda: check_dataset(tmp_path), lambda: open_dataset(tmp_path, SETTINGS).__enter__()):
        with pytest.raises(ValueError, match=r"manifest\.jsonl line") as caught:
            read()
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert manifest.read_bytes() == before


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    with open_dataset(tmp_path, {**SETTINGS, "steps": 1}):
        pass
    make(tmp_path, [0])  # nothing was made with the first settings
    with pytest.raises(ValueError, match="was begun with steps 5, not 6; give the same"):
        open_dataset(tmp_path, {**SETTINGS, "steps": 6}).__enter__()
    with pytest.raises(ValueError, match="was begun with guidance null, not 2"):
        open_dataset(tmp_path, {**SETTINGS, "guidance": 2}).__enter__()
    make(tmp_path, [1])


def test_a_folder_of_other_things_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for folder, message in (
        (tmp_path, "holds thesis.tex but no dataset.json"),
        (tmp_path / "thesis.tex", "is a file; choose another folder"),
        (tmp_path / "no" / "set", "the folder does not exist; create it first"),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset(folder, SETTINGS).__enter__()
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(ValueError, match="holds no dataset.json"):
        check_dataset(tmp_path)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with open_dataset(tmp_path, SETTINGS) as dataset:
        publish(dataset, 0)
        with pytest.raises(ValueError, match="another run is writing"):
            open_dataset(tmp_path, SETTINGS).__enter__()
        assert publish(dataset, 1)  # whose parts' folder is still there
    make(tmp_path, [2])
