"""Packs: what goes along, what is refused, and an empty environment that samples from one."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import volcast
from volcast.__main__ import app
from volcast.export.pack import pack
from volcast.export.pins import pinned
from volcast.export.wheel import platform_tag
from volcast.runtime.atomic import sha256
from volcast.runtime.cubins import CUBINS, CubinManifest
from volcast.runtime.pack import PACK, read_pack

UNWANTED = {
    "torch",
    "monai",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "pybind11",
    "openvino",
    "setuptools",
    "scipy",
    "triton",
}


@pytest.fixture(scope="module")
def packed(gaussian: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / "device"
    pack(gaussian, folder, "cpu")
    return folder


def cubins(artifact: Path, origin: Path) -> None:
    """An engines/cubin of no kernels, for the artifact in `origin`."""
    manifest = CubinManifest(
        format=1, name="gaussian", artifact=sha256(origin / "manifest.json"), precision="fp16", batch=1,
        latent_shape=(2, 4, 6, 4), triton_version="3", kernels={}, uses=(),
    )  # fmt: skip
    folder = artifact / "engines" / "cubin"
    folder.mkdir(parents=True)
    (folder / CUBINS).write_text(manifest.model_dump_json())


def test_a_pack_holds_what_a_device_needs_and_no_more(packed: Path, gaussian: Path) -> None:
    manifest = read_pack(packed)
    assert manifest.python == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert not UNWANTED & manifest.versions.keys()
    assert {"numpy", "onnxruntime", "pydantic", "nibabel", "typer", "volcast"} <= manifest.versions.keys()
    found = {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    assert found == manifest.files.keys() | {PACK}
    (wheel,) = (packed / "wheels").iterdir()
    assert found == {f"artifact/{path.name}" for path in gaussian.iterdir()} | {
        PACK, "requirements.txt", f"wheels/{wheel.name}"
    }  # fmt: skip
    pins = (packed / "requirements.txt").read_text().splitlines()[1:]
    assert pins == [f"{name}=={version}" for name, version in manifest.versions.items() if name != "volcast"]


def test_the_wheel_s_record_is_right(packed: Path) -> None:
    (path,) = (packed / "wheels").iterdir()
    with zipfile.ZipFile(path) as wheel:
        (record,) = (name for name in wheel.namelist() if name.endswith("/RECORD"))
        rows = {row[0]: row[1:] for row in csv.reader(wheel.read(record).decode().splitlines())}
        assert rows.keys() == set(wheel.namelist())
        for name, (digest, size) in rows.items():
            if name != record:
                data = wheel.read(name)
                encoded = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
                assert (digest, size) == (f"sha256={encoded}", str(len(data)))
    assert not [name for name in rows if "safetensors" in name or "__pycache__" in name]
    assert {
        "volcast/__init__.py",
        "volcast/runtime/pack.py",
        "volcast/kernels/configurations.json",
    } <= rows.keys()


def test_the_same_artifact_gives_the_same_pack(packed: Path, gaussian: Path, tmp_path: Path) -> None:
    assert pack(gaussian, tmp_path / "again", "cpu") == read_pack(packed)


def test_a_tar_holds_the_same(packed: Path, gaussian: Path, tmp_path: Path) -> None:
    manifest = pack(gaussian, tmp_path / "device.tar", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["device.tar"]
    with tarfile.open(tmp_path / "device.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    assert read_pack(tmp_path / "device") == manifest == read_pack(packed)


def test_an_altered_pack_is_refused(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app(["info", str(packed)]) == 0
    assert capsys.readouterr().out.startswith("pack of gaussian: target cpu, volcast ")
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    file = copy / "artifact" / "step.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    assert app(["info", str(copy)]) == 2
    assert "step.onnx is missing or was altered; copy the pack again" in capsys.readouterr().err
    (copy / PACK).write_text(json.dumps(json.loads((copy / PACK).read_text()) | {"target": "tpu"}))
    with pytest.raises(
        ValueError, match=r"\[pack\] .*pack.json: target Input should be .*; copy the pack again"
    ):
        read_pack(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "there"], r"\[pack\] .*there exists: remove it, choose another name, or pass --force"),
        (["-o", "there", "--force"], r"there holds no pack.json, something else: it is not replaced"),
        (["-o", "new", "--target", "cuda"], r"nothing built for cuda; run `volcast build .* --target cuda`"),
        (
            ["-o", "new", "--target", "cubin"],
            r"nothing built for cubin; run `volcast build .* --target cubin --sm 87`",
        ),
        (["-o", "new", "--target", "tensorrt-rtx"], r"run `volcast build .* --target tensorrt-rtx`"),
        (["-o", "new", "--target", "tensorrt"], r"run `volcast build .* --target tensorrt`"),
        (
            ["-o", "new", "--target", "tensorrt-rtx", "--platform", "aarch64"],
            r"has packages for x86_64 alone",
        ),
        (["-o", "no/such/new"], r"no/such is not a folder; create it first"),
        (["-o", "no/such/new.tar"], r"no/such is not a folder; create it first"),
    ],
)
def test_bad_input_is_named_and_nothing_is_left(
    gaussian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("years of work")
    assert app(["pack", str(gaussian), *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "thesis.txt"]


def test_engines_go_along_and_foreign_ones_do_not(
    gaussian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(gaussian, artifact)
    cubins(artifact, gaussian)
    (artifact / "engines" / "cuda").mkdir()
    manifest = pack(artifact, tmp_path / "new", "cubin")
    assert "artifact/engines/cubin/cubins.json" in manifest.files
    assert not (tmp_path / "new" / "artifact" / "engines" / "cuda").exists()
    shutil.rmtree(artifact / "engines")
    cubins(artifact, gaussian)
    changed = (artifact / "manifest.json").read_text().replace('"gaussian"', '"other"')
    (artifact / "manifest.json").write_text(changed)
    assert app(["pack", str(artifact), "-o", str(tmp_path / "new"), "--target", "cubin", "--force"]) == 2
    assert "cubin was built from another export; run `volcast build" in capsys.readouterr().err
    assert read_pack(tmp_path / "new") == manifest, "the older pack was touched"


def test_pins_are_the_closure_of_what_is_installed() -> None:
    pins = pinned(("openvino",), "x86_64")
    assert {"openvino", "numpy", "pydantic-core"} <= pins.keys() and "torch" not in pins
    with pytest.raises(
        ValueError, match=r"no-such-thing, which the target needs, is not installed here: no version"
    ):
        pinned(("no-such-thing",), "x86_64")


@pytest.mark.skipif(find_spec("ziglang") is not None, reason="has zig")
def test_another_machine_needs_a_compiler(gaussian: Path, tmp_path: Path) -> None:
    other = "aarch64" if platform.machine() == "x86_64" else "x86_64"
    with pytest.raises(
        ValueError, match=rf"--platform {other} needs ziglang to compile .*; pip install ziglang"
    ):
        pack(gaussian, tmp_path / "new", "cpu", machine=other)
    assert not list(tmp_path.iterdir())


def test_the_platform_is_the_oldest_c_library_that_fits(tmp_path: Path) -> None:
    core = tmp_path / "_core.so"
    core.write_bytes(b"\x7fELF\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.29\0GLIBC_PRIVATE\0")
    assert platform_tag(core, "aarch64") == "manylinux_2_34_aarch64"
    core.write_bytes(b"\x7fELF\0GLIBC_2.2.5\0")
    assert platform_tag(core, "x86_64") == "manylinux_2_17_x86_64"
    core.write_bytes(b"\x7fELF")
    with pytest.raises(ValueError, match="names no version of glibc"):
        platform_tag(core, "x86_64")


@pytest.mark.slow
def test_an_empty_environment_samples_the_same_bits(default_artifact_folder: Path, tmp_path: Path) -> None:
    pack(default_artifact_folder, tmp_path / "device", "cpu")
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (wheel,) = (tmp_path / "device" / "wheels").iterdir()
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile", "--no-deps"]
    # --no-deps: the requirements are complete, or the sample fails.
    subprocess.run(
        [*install, "-r", tmp_path / "device" / "requirements.txt", wheel], check=True, cwd=tmp_path
    )
    code = (
        "import sys, numpy, volcast\n"
        "model = volcast.load('device/artifact')\n"
        "volume = model.sample(seed=3, steps=2)\n"
        "numpy.save('there.npy', volume.array)\n"
        "volume.save('there.nii.gz')\n"
        "print(model.engine.name, volcast.__file__, *sys.modules)\n"
    )
    done = subprocess.run(
        [python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    engine, file, *modules = done.stdout.split()
    assert engine == "onnxruntime" and file.startswith(str(tmp_path / "env"))
    tops = {name.partition(".")[0] for name in modules}
    assert not tops & {
        "torch",
        "monai",
        "onnx",
        "pybind11",
        "openvino",
        "scipy",
        "setuptools",
        "pip",
        "typer",
    }
    here = volcast.load(default_artifact_folder, engine="onnxruntime").sample(seed=3, steps=2)
    np.testing.assert_array_equal(np.load(tmp_path / "there.npy"), here.array)
    assert (tmp_path / "there.nii.gz").stat().st_size > 10_000
