"""`volcast generate --ray`: a real cluster of one machine, and actors that are killed."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from volcast.__main__ import app
from volcast.runtime.atomic import sha256
from volcast.runtime.dataset_manifest import check_dataset, read_manifest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray takes 250 MB: pip install 'volcast[ray]'"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, int]]:
    """(address, process) of a head node with two CPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={port}", "--include-dashboard=false", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", f"--object-store-memory={10**8}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as head:
        assert head.stdout is not None
        try:
            for line in head.stdout:
                if "--block" in line:
                    break
            else:
                pytest.fail(f"ray start ended with exit code {head.wait()}")
            yield f"127.0.0.1:{port}", head.pid
        finally:
            head.terminate()
            head.wait(60)


def actors_below(process: int) -> list[int]:
    """The processes of our own class among the descendants of `process`."""
    found = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            name = Path(f"/proc/{child}/cmdline").read_bytes()
            found += [int(child)] if name.startswith(b"ray::Worker") else actors_below(int(child))
    return found


def test_killed_actors_are_replaced(gaussian: Path, tmp_path: Path, cluster: tuple[str, int]) -> None:
    address, head = cluster
    fixed = [gaussian, "--engine", "onnxruntime", "--num", 24, "--steps", 200, "-c", "ratio=uniform:0,1"]
    words = ["generate", *map(str, fixed), "--json", "-q"]
    there, alone = tmp_path / "ray", tmp_path / "alone"
    command = [sys.executable, "-m", "volcast", *words, "--out", str(there), "--ray", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while len(list(read_manifest(there))) < 3:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        victims = actors_below(head)
        assert len(victims) in (1, 2)
        os.kill(victims[0], signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert (summary["made"], summary["workers_lost"]) == (24, 1)
    assert app([*words, "--out", str(alone)]) == 0
    found = {}
    for folder in (there, alone):
        assert check_dataset(folder).intact == 24
        found[folder] = {entry.index: sha256(folder / entry.file) for entry, _ in read_manifest(folder)}
    assert found[there] == found[alone]


def test_no_cluster_is_one_line(gaussian: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "volcast",
        "generate",
        str(gaussian),
        "--num",
        "1",
        "--out",
        str(tmp_path / "set"),
    ]
    done = subprocess.run(
        [*command, "--ray", "127.0.0.1:1", "-q"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("volcast: ")
    assert "Traceback" not in done.stderr
