"""Kernels compiled for a device that is not here, as an edge developer does it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from volcast.__main__ import app
from volcast.runtime.cubins import CUBINS, read_cubins

# The interpreter of the other tests compiles nothing.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


@pytest.fixture(scope="session")
def built(
    default_artifact_folder: Path, default_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("cubins") / "orin"
    command = [
        sys.executable,
        "-m",
        "volcast",
        "build",
        default_artifact_folder,
        "--target",
        "cubin",
        "--sm",
        "8.7",
    ]
    done = subprocess.run(
        [*command, "-o", folder], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no kernel for" not in done.stdout
    assert re.search(r"group_norm .* sm_87 ", done.stdout)
    return folder


@pytest.mark.slow
def test_the_bundled_model_s_kernels(built: Path, default_artifact_folder: Path) -> None:
    manifest = read_cubins(built)
    assert {use.operation for use in manifest.uses} == {
        "group_norm", "layer_norm", "attention", "input_head", "output_head", "upsample_convolution",
        "sampler_step", "sampler_step_guided",
    }  # fmt: skip
    assert all(use.launches["sm_87"] and use.left_out is None for use in manifest.uses)
    graph = onnx.load(default_artifact_folder / "step.onnx", load_external_data=False).graph
    norms = {node.output[0] for node in graph.node if node.op_type == "LayerNormalization"}
    assert {use.node for use in manifest.uses if use.operation == "layer_norm"} == norms != set()
    launched = {launch.kernel for use in manifest.uses for launch in use.launches["sm_87"]}
    assert launched == manifest.kernels.keys()
    for kernel in manifest.kernels.values():
        cubin = kernel.files["sm_87"]
        data = (built / cubin.file).read_bytes()
        # An ELF file for NVIDIA's machine (190) that holds the entry point.
        assert data[:4] == b"\x7fELF" and int.from_bytes(data[18:20], "little") == 190
        assert f".text.{kernel.entry}".encode() in data
        assert cubin.spill_bytes == 0
        assert cubin.shared_bytes <= 163 * 1024


@pytest.mark.slow
def test_every_argument_of_a_launch_is_named(built: Path) -> None:
    manifest = read_cubins(built)
    for use in manifest.uses:
        for launch in use.launches["sm_87"]:
            names = [name for name, _ in manifest.kernels[launch.kernel].signature]
            assert sorted(names) == sorted([*launch.tensors, *launch.numbers])
            assert min(launch.grid) >= 1


@pytest.mark.slow
def test_an_altered_cubin_is_refused(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    file = next(copy.rglob("*.cubin"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"\[cubins\] .*{file.name} is missing or was altered; run `volcast build"
    ):
        read_cubins(copy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format Input should be less than or equal to 1"),
        ({"extra": 0}, "extra Extra inputs are not permitted"),
        ({"precision": "int8"}, "precision Input should be"),
    ],
)
def test_a_damaged_manifest_is_named(
    built: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    manifest = json.loads((built / CUBINS).read_text()) | change
    (tmp_path / CUBINS).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        read_cubins(tmp_path)


def test_a_folder_without_cubins_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no cubins.json; run `volcast build --target cubin` again"):
        read_cubins(tmp_path)
    (tmp_path / CUBINS).write_text("{")
    with pytest.raises(ValueError, match=r"\[cubins\] .*Expecting"):
        read_cubins(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sm", "75"], "[build] sm=75: need some of 80, 87, 89, 90, 100, 120"),
        (["--sm", "orin"], "[build] --sm 'orin': need a compute capability such as 87 or 8.7"),
        (["--sm", "90", "--size", "9,12,8"], "[build] d0=9: need"),
        (["--sm", "90", "--size", "8x12x8"], "[build] size=8x12x8: need whole numbers"),
        (["--sm", "90", "--batch", "65"], "[build] batch=65: need 1..64"),
    ],
)
def test_bad_input_is_named(
    default_artifact_folder: Path, default_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    folder = tmp_path / "cubins"
    assert (
        app(["build", str(default_artifact_folder), "--target", "cubin", "-o", str(folder), *arguments]) == 2
    )
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", str(tmp_path), "--target", "cubin", "--sm", "90", "-o", str(tmp_path)]
    assert app(arguments) == 2
    assert "exists: remove it, choose another name, or pass --force" in capsys.readouterr().err


def test_force_replaces_cubins_only(
    default_artifact_folder: Path, default_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(default_artifact_folder, artifact)
    arguments = ["build", str(artifact), "--target", "cubin", "--sm", "90", "-o", str(artifact), "--force"]
    assert app(arguments) == 2
    assert "holds no cubins.json, something else: it is not replaced" in capsys.readouterr().err
    assert (artifact / "step.onnx").is_file()


def test_an_artifact_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app(["build", str(tmp_path / "none"), "--target", "cubin", "--sm", "90"]) == 2
    assert "none is not a folder; give one written by `volcast export`" in capsys.readouterr().err
