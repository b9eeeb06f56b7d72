"""`volcast generate`: every volume once and with the bits of `sample_many`, whoever is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import nibabel
import numpy as np
import pytest

import volcast
from volcast.__main__ import app
from volcast.runtime import generate
from volcast.runtime.atomic import sha256
from volcast.runtime.dataset import open_dataset
from volcast.runtime.dataset_manifest import check_dataset, read_manifest, volume_name
from volcast.runtime.generate_worker import Crew, Died, Event, Finished, Ready, Recipe, Task, Worker

COUNT, STEPS = 24, 200
MANY = 400
"""Of a run that is to be disturbed before it ends: a few seconds on a fast machine."""


def arguments(artifact: Path, out: Path, *more: object, count: int = COUNT) -> list[str]:
    fixed = ["generate", artifact, "--out", out, "--engine", "onnxruntime", "--steps", STEPS, "--seed", 3]
    return [str(word) for word in (*fixed, "-c", "anterior=uniform:0,1", "--num", count, *more)]


def start(*words: str, prefix: str = "") -> subprocess.Popen[str]:
    code = f"{prefix}\nimport sys\nfrom volcast.__main__ import app\nsys.exit(app())"
    return subprocess.Popen([sys.executable, "-c", code, *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip


def files(folder: Path) -> dict[int, str]:
    """The sha256 of the file itself of each line: the manifest's is compared by `check_dataset`."""
    found = check_dataset(folder)
    assert not (found.missing or found.altered or found.unlisted)
    return {entry.index: sha256(folder / entry.file) for entry, _ in read_manifest(folder)}


def workers_of(process: int) -> list[int]:
    """The workers that it started; not multiprocessing's tracker."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(child) for child in children if b"spawn_main" in _command(child)]


def _command(process: object) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(gaussian: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of a run that nobody disturbed, with one worker."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    assert app(arguments(gaussian, folder, "--workers", 1, "-q")) == 0
    return folder


def test_volumes_are_those_of_sample_many(gaussian: Path, whole: Path, capsys) -> None:
    entries = sorted((entry for entry, _ in read_manifest(whole)), key=lambda entry: entry.index)
    assert [entry.index for entry in entries] == list(range(COUNT))
    assert len({entry.sha256 for entry in entries}) == COUNT
    model = volcast.load(gaussian, engine="onnxruntime", threads=1)
    conditions = [entry.conditions for entry in entries]
    assert len({condition["anterior"] for condition in conditions}) == COUNT
    for entry, volume in zip(
        entries, model.sample_many(COUNT, 3, condition=conditions, steps=STEPS), strict=True
    ):
        assert (entry.seed, entry.sample, entry.file) == (3, entry.index, volume_name(entry.index))
        assert entry.shape == volume.array.shape
        image = nibabel.load(whole / entry.file)
        np.testing.assert_array_equal(np.asarray(image.dataobj), volume.array)
        np.testing.assert_array_equal(image.affine, volume.affine)
    described = json.loads((whole / "dataset.json").read_text())
    assert described["artifact"] == {
        "name": "gaussian",
        "manifest_sha256": sha256(gaussian / "manifest.json"),
    }
    assert (described["scheduler"], described["volcast"]) == ("ddim", volcast.__version__)
    # A second run has nothing to do, and starts no process.
    before = (whole / "manifest.jsonl").read_bytes()
    assert app(arguments(gaussian, whole, "--json", "-q")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["made"], summary["already_there"]) == (0, COUNT)
    assert (whole / "manifest.jsonl").read_bytes() == before


def test_the_other_branch_of_guidance_may_have_conditions(gaussian: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"seed": 3, "engine": "onnxruntime", "condition": ["anterior=0.25"]}
    negative, settings = ["anterior=0.9", "posterior=0"], {"steps": 3, "guidance": 2.0}
    generation = generate.prepare(gaussian, 2, negative=negative, settings=settings, **given)
    assert generation.described()["negative"] == {"anterior": 0.9, "posterior": 0.0}
    assert "negative" not in generate.prepare(gaussian, 2, settings=settings, **given).described()
    worker = Worker(generation.recipe(tmp_path))
    worker.load()
    made = worker.make(Task(sample=1, own={}))
    with volcast.load(gaussian, engine="onnxruntime", threads=1) as model:
        other = {"anterior": 0.9, "posterior": 0.0}
        alone = model.submit(3, sample=1, condition={"anterior": 0.25}, negative=other, **settings).result()
    np.testing.assert_array_equal(np.asarray(nibabel.load(made.part).dataobj), alone.array)
    with pytest.raises(ValueError, match="negative without guidance"):
        generate.prepare(gaussian, 1, negative=negative, settings={"steps": 3}, **given)
    with pytest.raises(ValueError, match=r"\[negative\] unknown name 'front'"):
        generate.prepare(gaussian, 1, negative=["front=1"], settings=settings, **given)


def test_killed_workers_are_replaced(gaussian: Path, whole: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    out = tmp_path / "set"
    with start(*arguments(gaussian, out, "--workers", 2, "--json", count=MANY)) as process:
        for number in (2, 9):  # volumes, by when one is killed
            wait_for(lambda number=number: len(_lines(out)) >= number and workers_of(process.pid))
            time.sleep(chance.uniform(0, 0.05))
            os.kill(chance.choice(workers_of(process.pid)), signal.SIGKILL)
        printed, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    summary = json.loads(printed)
    assert (summary["made"], summary["workers_lost"]) == (MANY, 2)
    made = files(out)
    assert len(made) == MANY and {index: made[index] for index in range(COUNT)} == files(whole)


def test_killed_and_interrupted_runs_are_taken_up(gaussian: Path, whole: Path, tmp_path: Path) -> None:
    chance = random.Random(1)
    out = tmp_path / "set"
    for number, stop in ((1, signal.SIGKILL), (6, signal.SIGINT), (12, signal.SIGKILL)):
        with start(*arguments(gaussian, out, "--workers", 2, count=MANY)) as process:
            wait_for(lambda number=number: len(_lines(out)) >= number and workers_of(process.pid))
            time.sleep(chance.uniform(0, 0.05))
            workers = workers_of(process.pid)
            if stop == signal.SIGINT:
                os.killpg(process.pid, stop)  # as a terminal does: the workers get it too
            else:
                process.send_signal(stop)
            _, err = process.communicate(timeout=30)
        assert workers, err
        assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
        if stop == signal.SIGINT:
            assert "Traceback" not in err and "stopped; the same command goes on" in err
            assert not list(out.glob(".parts-*"))
        wait_for(lambda workers=workers: not any(_command(worker) for worker in workers), 10)
    assert len(_lines(out)) < MANY  # none had come to its end
    assert app(arguments(gaussian, out, "--workers", 2, "-q")) == 0
    made = files(out)
    assert {index: made[index] for index in range(COUNT)} == files(whole)
    assert not list(out.glob(".parts-*"))


def _lines(out: Path) -> list[Any]:
    return list(read_manifest(out))


def test_check_finds_a_flipped_byte_and_the_run_mends_it(gaussian: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "set"
    few = arguments(gaussian, out, "--num", 3, "--workers", 1, "-q")
    assert app(few) == 0
    before = files(out)
    path = out / volume_name(1)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    (out / volume_name(2)).unlink()
    capsys.readouterr()
    assert app(["generate", "--check", str(out), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found == {"intact": 1, "altered": [volume_name(1)], "missing": [volume_name(2)], "unlisted": []}
    assert app(["generate", "--check", str(out)]) == 1
    printed, err = capsys.readouterr()
    assert f"altered: {volume_name(1)}" in printed and "delete the altered files" in err
    path.unlink()
    assert app(few) == 0 and files(out) == before
    assert app(["generate", "--check", str(out)]) == 0


def test_a_sample_that_kills_workers_is_the_last_and_is_told(
    gaussian: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(generate, "_LONGEST_PAUSE_S", 0.0)

    @final
    class Fragile(Crew):
        """Two workers in this process; sample 1 is the death of whoever begins it."""

        def __init__(self, recipe: Recipe) -> None:
            self.recipe = recipe
            self.workers: dict[int, Worker] = {}
            self.happening: list[Event] = []
            self.begun: list[int] = []

        def hire(self, slot: int) -> None:
            self.workers[slot] = Worker(self.recipe)
            self.workers[slot].load()
            self.happening.append(Ready(slot=slot))

        def give(self, slot: int, task: Task) -> None:
            if slot not in self.workers:
                return
            self.begun.append(task.sample)
            if task.sample == 1:
                del self.workers[slot]
                self.happening.append(Died(slot=slot, reason="exit code -9"))
            else:
                self.happening.append(Finished(slot=slot, made=self.workers[slot].make(task)))

        def events(self, timeout: float | None) -> list[Event]:
            happened, self.happening = self.happening[:1], self.happening[1:]
            return happened

        def close(self) -> None: ...

    wanted = generate.prepare(gaussian, 12, engine="onnxruntime", settings={"steps": 2})
    with open_dataset(tmp_path / "set", wanted.described()) as dataset:
        crew = Fragile(wanted.recipe(dataset.parts))
        with pytest.raises(ValueError, match="no worker lasts, 1 volumes are not made .*exit code -9"):
            generate.run(wanted, dataset, crew, 2, lambda: None)
        assert dataset.done == {*range(12)} - {1}
    assert crew.begun.count(1) >= generate.FALLS and crew.begun.count(2) == 1


def test_no_room_is_one_line(gaussian: Path, tmp_path: Path) -> None:
    # RLIMIT_FSIZE stands for a full disk: a volume takes 0.7 kB here, the description 0.4 kB.
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))"
    out = tmp_path / "set"
    with start(*arguments(gaussian, out, "-q"), prefix=limit) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "size limit" in err, err
    assert _lines(out) == [] and not list(out.glob(".parts-*"))


def test_none_at_all(gaussian: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "set"
    assert app(arguments(gaussian, out, "--num", 0, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["made"] == 0
    assert files(out) == {} and (out / "manifest.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num", -1], "num=-1: need 0..1000000"),
        (["--num", 1000001], "num=1000001"),
        (["--steps", 0], "steps=0: need 1..1000"),
        (["--seed", -1], "seed=-1"),
        (["--guidance", "nan"], "guidance=nan"),
        (["-c", "posterior=uniform:0,2"], "need 0..1 (sample"),
        (["-c", "front=1"], "unknown name 'front'"),
    ],
)
def test_bad_input_is_one_line_before_any_work(gaussian: Path, tmp_path: Path, capsys, more, message) -> None:
    assert app(arguments(gaussian, tmp_path / "set", *more)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("volcast: [") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_other_settings_and_other_folders_are_refused(
    gaussian: Path, whole: Path, tmp_path: Path, capsys
) -> None:
    for more, message in (
        (["--seed", 4], "was begun with seed 3, not 4"),
        (["-c", "posterior=0.5"], "was begun with conditions"),
        (["--guidance", 2], "was begun with guidance null, not 2.0"),
        (["--threads", 2], "was begun with threads 1, not 2"),
    ):
        assert app(arguments(gaussian, whole, *more)) == 2
        assert message in capsys.readouterr().err
    assert app(arguments(gaussian, gaussian)) == 2
    assert "but no dataset.json; choose a new" in capsys.readouterr().err
    assert app(["generate", str(gaussian), "--num", "3"]) == 2
    assert "--num and --out are needed" in capsys.readouterr().err
    assert app(["generate", "--check", str(tmp_path)]) == 2
    assert "holds no dataset.json" in capsys.readouterr().err
