"""A memory limit while samples share the network: kept by all threads together, and refused where it cannot be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from volcast.runtime.host_memory import HostMemory
from volcast.runtime.job import make_job
from volcast.runtime.memory_limit import MemoryLimit
from volcast.runtime.pipeline import Model, load
from volcast.runtime.request import make_request

ROOM = {"onnxruntime": 130, "openvino": 220}
"""MiB: more than programs, samples and the least slabs take (54 + 36, 163 + 25), less than with a whole decode
(54 + 123, 163 + 59), the reserve of a twentieth of everything counted."""


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_limit_is_kept_by_all_threads_together(default_artifact_folder: Path, engine: str) -> None:
    """In a process of its own: two samples at once, their decodes in slabs."""
    pytest.importorskip(engine)
    code = f"""
import numpy as np
from volcast.runtime.memory import PeakMemory
from volcast.runtime.pipeline import load
with load({str(default_artifact_folder)!r}, {engine!r}, 1, "64GiB", active=2, queue=2) as model:
    memory = model._memory
    memory.limit = limit = memory.base + {ROOM[engine]} * 2**20
    peak = PeakMemory()
    one, other = (future.result() for future in [model.submit(7, steps=1) for _ in range(2)])
    assert peak.bytes() <= limit, (peak.bytes(), limit)
    assert all(plan.slabs for plan in memory._plans.values())
np.testing.assert_array_equal(one.array, other.array)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def open_model(folder: Path, room: int, **limits: int) -> Model:
    """With `room` bytes for programs and samples, whatever this process takes by now."""
    model = load(folder, "onnxruntime", 1, "64GiB", **limits)
    assert isinstance(model._memory, HostMemory)
    model._memory.limit = model._memory.base + room
    return model


def test_what_is_asked_for_later_leaves_less_and_is_refused(default_artifact_folder: Path) -> None:
    """Every size keeps a step of its own, and room for its samples."""
    with open_model(default_artifact_folder, 300 * 2**20, active=2, queue=2) as model:
        first = model.submit(0, steps=1)
        memory: MemoryLimit | None = model._memory
        assert memory is not None
        job = make_job(model.spec, make_request(model.spec, 0, {"steps": 1}), 1, 1, None, None)
        taken, step = memory.taken, memory.footprint("step", {"batch": 1, **dict(zip(("d0", "d1", "d2"), job.shape[1:], strict=True))})  # fmt: skip
        assert taken > step.held
        with pytest.raises(
            ValueError, match=r"needs at least \d+ bytes.*submit keeps \d+ bytes for 4 samples"
        ):
            model.submit(1, steps=1, size=(32, 48, 32))
        assert memory.taken == taken
        again = model.submit(0, steps=1)
        np.testing.assert_array_equal(first.result(60).array, again.result(60).array)


def test_an_image_is_encoded_beside_what_is_open(default_artifact_folder: Path) -> None:
    with open_model(default_artifact_folder, 500 * 2**20, active=1, queue=1) as model:
        image = model.submit(3, steps=1).result(60)
        found = model.submit(4, image=image, strength=0.5, steps=4).result(60)
    wanted = load(default_artifact_folder, "onnxruntime", 1).sample(4, image=image, strength=0.5, steps=4)
    # As above; what was decoded whole twice has the same bits.
    assert np.linalg.norm(found.array - wanted.array) < 1e-4 * np.linalg.norm(wanted.array)


def test_submit_has_the_limit_to_itself(gaussian: Path) -> None:
    model = load(gaussian, "onnxruntime", 1, "64GiB")
    volume = model.sample(1)
    np.testing.assert_array_equal(model.submit(1).result(60).array, volume.array)
    for call in (
        lambda: model.sample(1),
        lambda: model.decode(np.zeros((2, 4, 6, 4))),
        lambda: model.encode(volume),
    ):
        with pytest.raises(ValueError, match="memory_limit: submit has all of it"):
            call()
    model.close()


def test_a_model_of_images_keeps_a_limit_too(gaussian: Path, tmp_path: Path) -> None:
    """No decode: what is taken alone has to fit."""
    import json

    folder = Path(shutil.copytree(gaussian, tmp_path / "pixels"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("decode", "encode"):
        del manifest["programs"][name], manifest["files"][f"{name}.onnx"]
    manifest["axes"] = [axis for axis in manifest["axes"] if not axis["name"].startswith("o")]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with open_model(folder, 64 * 2**20) as model:
        assert model.submit(1).result(60).array.shape == (2, 4, 6, 4)
    with open_model(folder, 2**20) as model, pytest.raises(ValueError, match="submit keeps"):
        model.submit(1)
