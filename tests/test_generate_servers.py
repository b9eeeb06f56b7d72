"""`volcast generate --server`: the volumes of a local run, each once, also when a server dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from served import Served, free_ports, start

from volcast.__main__ import app
from volcast.runtime.atomic import sha256
from volcast.runtime.dataset_manifest import check_dataset, read_manifest

COUNT, MANY = 12, 400
"""Of a run that nobody disturbs, and of one that has not ended when a server is killed."""


def arguments(artifact: Path, out: Path, *more: object) -> list[str]:
    # 1.7 is no float32: what a server reads must be the number itself.
    fixed = [
        "generate",
        artifact,
        "--out",
        out,
        "--steps",
        50,
        "--seed",
        3,
        "--guidance",
        1.7,
        "--negative",
        "anterior=0.9",
    ]
    return [str(word) for word in (*fixed, "-c", "anterior=uniform:0,1", "-c", "posterior=0.3", *more)]


def address(served: Served) -> str:
    return f"127.0.0.1:{served.grpc}"


def files(folder: Path) -> dict[int, str]:
    """The sha256 of the file itself of each line."""
    found = check_dataset(folder)
    assert not (found.missing or found.altered or found.unlisted)
    return {entry.index: sha256(folder / entry.file) for entry, _ in read_manifest(folder)}


def test_a_dead_servers_volumes_are_made_by_the_other(
    served: Served, gaussian: Path, tmp_path: Path, capsys: Any
) -> None:
    local, out = tmp_path / "local", tmp_path / "set"
    here = ("--engine", "onnxruntime", "--threads", 1)
    assert app(arguments(gaussian, local, "--num", COUNT, "--workers", 1, "-q", *here)) == 0
    doomed = start(gaussian)
    try:
        doomed.wait("ready: gaussian")
        both = ("--server", address(served), "--server", address(doomed), "--workers", 6)
        command = [
            sys.executable,
            "-m",
            "volcast",
            *arguments(gaussian, out, "--num", MANY, "--json", "-q", *both),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            end = time.monotonic() + 60
            while doomed.asked() < 40:
                assert time.monotonic() < end and process.poll() is None
            # Stopped, it holds what it was asked; killed then, it has not answered that.
            for one in doomed.processes("triton"):
                os.kill(one, signal.SIGSTOP)
            doomed.end()
            printed, err = process.communicate(timeout=120)
    finally:
        if doomed.process.poll() is None:
            doomed.end()
    assert process.returncode == 0, err
    summary = json.loads(printed)
    assert summary["made"] == MANY and summary["workers_lost"] >= 1, err
    made = files(out)
    assert sorted(made) == list(range(MANY)) and len(set(made.values())) == MANY
    expected = files(local)
    assert {index: made[index] for index in range(COUNT)} == expected
    # A local run finds nothing left to do: it is the same dataset.
    assert app(arguments(gaussian, out, "--num", MANY, "--json", "-q", *here)) == 0
    assert json.loads(capsys.readouterr().out)["made"] == 0


def test_another_server_is_refused_by_name(
    served: Served, gaussian: Path, tmp_path: Path, capsys: Any
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in gaussian.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace("closed form", "another"))
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    for artifact, more, message in [
        (other, ("--server", address(served)), "serves another artifact"),
        (
            gaussian,
            ("--server", address(served), "--threads", 2),
            "onnxruntime and 1 threads, not onnxruntime and 2",
        ),
        (gaussian, ("--server", nobody), "no server answers"),
        (gaussian, ("--server", nobody, "--ray", "auto"), "give one of them"),
    ]:
        out = tmp_path / "set"
        assert app(arguments(artifact, out, "--num", 2, *more)) == 2
        printed, err = capsys.readouterr()
        assert printed == "" and message in err.splitlines()[-1]
        assert not out.exists() or not list(read_manifest(out))
        if out.exists():
            for path in sorted(out.rglob("*"), reverse=True):
                path.unlink()
            out.rmdir()


def test_one_of_two_servers_is_enough(served: Served, gaussian: Path, tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    out = tmp_path / "set"
    assert (
        app(arguments(gaussian, out, "--num", COUNT, "-q", "--server", nobody, "--server", address(served)))
        == 0
    )
    assert len(files(out)) == COUNT
