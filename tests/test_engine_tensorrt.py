"""The TensorRT engines without a GPU: what is missing is named at request, and no plan reaches a library unchecked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from host_network import HostEngine

import volcast
from volcast import _core
from volcast.__main__ import app
from volcast.runtime.artifact import MANIFEST, read_artifact
from volcast.runtime.atomic import sha256
from volcast.runtime.engine_tensorrt import OneByOne
from volcast.runtime.gpu import Gpu
from volcast.runtime.plans import PLANS, Host
from volcast.runtime.tensorrt_library import Library, open_library
from volcast.runtime.tensorrt_model import TensorRtModel, find_plans

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip("tensorrt_rtx_bindings")
    return open_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def built(gaussian: Path, library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small artifact with plans for 8.6 and, apart from them, for 8.9. Copy it before a change."""
    from volcast.export.to_tensorrt import build_tensorrt

    folder = tmp_path_factory.mktemp("built") / "gaussian"
    shutil.copytree(gaussian, folder)
    for capability in (86, 89):
        build_tensorrt(folder, "tensorrt-rtx", capabilities=(capability,), precision="fp32", batch=(1, 2))
    return folder


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "artifact"))


def gpu(capability: int = 86) -> Gpu:
    return Gpu(name="RTX A", capability=capability, driver=_core.Driver.host())


def host(library: Library, capability: int = 86, version: str | None = None) -> Host:
    return Host(target="tensorrt-rtx", version=version or library.version, gpu="RTX A", capability=capability)


def test_a_library_that_is_missing_is_named_with_its_install_line(
    gaussian: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    for engine in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(
            ValueError, match=rf"^\[{engine}\] it is not installed; pip install 'volcast\[{engine}\]'"
        ):
            volcast.load(gaussian, engine=engine)
        assert app(["sample", str(gaussian), "--engine", engine, "-o", "never.nii.gz"]) == 2
        assert capsys.readouterr().err.startswith(f"volcast: [{engine}] it is not installed; pip install")
        assert app(["build", str(gaussian), "--target", engine]) == 2
        assert capsys.readouterr().err.startswith(f"volcast: [{engine}] it is not installed; pip install")


def test_a_library_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("tensorrt")
    old.__version__ = "8.6.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(
        ValueError, match=r"^\[tensorrt\] version 8\.6\.1 is too old: need 10\.12 or newer; pip install"
    ):
        open_library("tensorrt")


@needs_no_gpu
def test_a_gpu_that_is_missing_is_named(gaussian: Path, library: Library) -> None:
    with pytest.raises(
        ValueError, match=r"^\[tensorrt-rtx\] needs an NVIDIA GPU: \[cuda\] .*(driver|device)"
    ):
        volcast.load(gaussian, engine="tensorrt-rtx")


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, volcast\n"
        "from volcast.runtime import engine_auto, plans, tensorrt_library, engine_tensorrt, tensorrt_model\n"
        "print(*[name for name in sys.modules if name.partition('.')[0].startswith(('tensorrt', 'torch', 'onnx'))\n"
        "        and not name.startswith('onnxruntime')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_plans_of_this_device_are_found(built: Path, library: Library) -> None:
    for capability in (86, 89):
        folder, plans = find_plans(built, host(library, capability))
        assert folder.name == f"tensorrt-rtx-sm{capability}" and plans.capabilities == (capability,)


def test_others_are_refused_with_the_command(artifact: Path, library: Library) -> None:
    command = (
        r"run `volcast build ARTIFACT --target tensorrt-rtx --precision fp32 --sm 86 --batch 1:2 --force`"
    )
    with pytest.raises(
        ValueError, match=rf"for compute capability 8\.6, this is RTX A \(12\.0\); {command} with --sm 120$"
    ):
        find_plans(artifact, host(library, 120))
    with pytest.raises(
        ValueError, match=rf"was built by tensorrt-rtx {library.version}, this is 9\.9\.9\.9; {command}$"
    ):
        find_plans(artifact, host(library, version="9.9.9.9"))
    with pytest.raises(
        ValueError, match=r"holds no plans\.json for tensorrt; run `volcast build .* --target tensorrt`$"
    ):
        find_plans(artifact, Host(target="tensorrt", version="10.12.0.36", gpu="A", capability=86))
    manifest = json.loads((artifact / MANIFEST).read_text())
    (artifact / MANIFEST).write_text(json.dumps(manifest))  # another export's digest
    with pytest.raises(ValueError, match=rf"was built from another export of gaussian; {command}$"):
        find_plans(artifact, host(library))


def test_one_bad_folder_does_not_hide_a_good_one(artifact: Path, library: Library) -> None:
    (artifact / "engines" / "tensorrt-rtx-sm86" / PLANS).write_text("{")
    assert find_plans(artifact, host(library, 89))[0].name == "tensorrt-rtx-sm89"
    with pytest.raises(ValueError, match=r"tensorrt-rtx-sm86/plans\.json: "):
        find_plans(artifact, host(library, 86))


class Loads:
    """Counts what reaches the library."""

    def __init__(self, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, real = 0, library.deserialize

        def counted(plan: bytes, host_code: bool) -> object:
            self.count += 1
            return real(plan, host_code)

        monkeypatch.setattr(library, "deserialize", counted)


def test_no_byte_of_a_bad_plan_reaches_the_library(
    artifact: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, loads = read_artifact(artifact), Loads(library, monkeypatch)
    step, sizes = spec.programs["step"], {"batch": 1, "d0": 4, "d1": 6, "d2": 4}
    plan = artifact / "engines" / "tensorrt-rtx-sm86" / "step.plan"
    content = plan.read_bytes()

    def opened(**others: int) -> None:
        TensorRtModel(artifact, library, gpu()).network(artifact / "step.onnx", step, sizes | others)

    with pytest.raises(
        ValueError, match=r"^\[step\] batch=3: the plan in .*sm86 takes 1\.\.2; build with another --batch"
    ):
        opened(batch=3)
    with pytest.raises(
        ValueError, match=r"^\[step\] d1=8: the plan in .* takes 6\.\.6; build with another --size"
    ):
        opened(d1=8)
    for changed, message in (
        (content[: len(content) // 2], "was cut short; run `volcast build"),
        (content[:-1] + bytes([content[-1] ^ 1]), "was altered; run `volcast build"),
    ):
        plan.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            opened()
    plan.write_bytes(content)
    with open(artifact / "step.onnx", "ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ValueError, match=r"step\.plan was built from another step\.onnx; run `volcast build"):
        opened()
    assert loads.count == 0


@needs_no_gpu
def test_a_good_plan_reaches_the_library(
    built: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, spec = Loads(library, monkeypatch), read_artifact(built)
    model = TensorRtModel(built, library, gpu())
    with pytest.raises(ValueError, match=r"^\[tensorrt-rtx\] cannot load the plan: "):
        model.network(built / "step.onnx", spec.programs["step"], {"batch": 1, "d0": 4, "d1": 6, "d2": 4})
    assert loads.count == 1
    assert model.plans.artifact == sha256(built / MANIFEST)


def test_images_are_decoded_one_by_one(gaussian: Path) -> None:
    """What a plan for one image gives for a batch are the same images."""
    program = read_artifact(gaussian).programs["decode"]
    engine, sizes = HostEngine(), {"d0": 4, "d1": 6, "d2": 4}
    z = np.random.default_rng(0).standard_normal((3, 2, 4, 6, 4)).astype(np.float32)
    whole = engine.open(gaussian / "decode.onnx", program, {"batch": 3, **sizes})({"z": z})["image"]
    single = engine.open(gaussian / "decode.onnx", program, {"batch": 1, **sizes})
    np.testing.assert_array_equal(OneByOne(single, 3)({"z": z})["image"], whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gpu_samples_what_onnx_runtime_samples(
    gaussian: Path, tmp_path: Path, library: Library, precision: str
) -> None:
    from volcast.export.to_tensorrt import build_tensorrt
    from volcast.runtime.gpu import local_gpu

    here = local_gpu("test")
    if here.capability not in library.capabilities():
        pytest.skip(f"{library.target} does not take {here.capability}")
    folder = Path(shutil.copytree(gaussian, tmp_path / "gaussian"))
    build_tensorrt(folder, "tensorrt-rtx", capabilities=(here.capability,), precision=precision, batch=(1, 2))
    ours, theirs = volcast.load(folder, engine="tensorrt-rtx"), volcast.load(folder, engine="onnxruntime")
    unit = 2.0**-24 if precision == "fp32" else 2.0**-11
    for settings in ({"steps": 4}, {"steps": 4, "guidance": 2.0}, {"steps": 3, "scheduler": "ddpm"}):
        arguments = {"batch": 2, "condition": {"anterior": 0.9}, **settings}
        for one, other in zip(
            ours.sample_many(3, 5, **arguments), theirs.sample_many(3, 5, **arguments), strict=True
        ):
            # Some ten roundings a step, and decode's; the plan's coefficients grow none of them more than tenfold.
            error = np.linalg.norm(one.array - other.array) / np.linalg.norm(other.array)
            assert error < 10 * unit * np.sqrt(10 * settings["steps"])
