"""Decoding in slabs by ONNX Runtime and OpenVINO: the whole decode's numbers at every height, within the memory foretold."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from volcast.runtime.artifact import read_artifact
from volcast.runtime.autoencoder import decode
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.host_memory import HostMemory
from volcast.runtime.moments import merged
from volcast.runtime.pipeline import load
from volcast.runtime.programs import Programs
from volcast.runtime.slab_decode import decode_slabs
from volcast.runtime.slab_schedule import schedule
from volcast.runtime.slabs import SlabProgram

# The budget; both are float32 and differ in the order of sums alone (some 1e-6 here).
BUDGET = 1e-4


def relative(result: np.ndarray, wanted: np.ndarray) -> float:
    return float(
        np.linalg.norm(result.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64))
    )


def check(
    folder: Path, sizes: tuple[int, ...], heights: tuple[int, ...], share: int, engine: str = "onnxruntime"
) -> None:
    """Every `share`-th value stored, the others made anew where they are read."""
    spec = read_artifact(folder)
    assert spec.slabs is not None
    programs = Programs(folder, spec, open_engine(engine, 1))
    z = np.random.default_rng(0).standard_normal((1, spec.latent_shape[0], *sizes)).astype(np.float32)
    axes = {"batch": 1, **{f"d{axis}": size for axis, size in enumerate(sizes)}}
    whole = programs.open_alone(spec.programs["decode"], axes)({"z": z})["image"]  # odd sizes too
    program = SlabProgram(spec.slabs, sizes)
    forced = {
        name
        for i in program.whole
        for one in (program.operations[i],)
        for name in (*one.inputs, *one.outputs)
    }
    stored = {"image", *forced, *(segment.value for segment in spec.slabs.segments[::share])}
    for height in heights:
        passes = [
            replace(one, height=0 if one.indices[-1] in program.whole else height)
            for one in schedule(program, program.whole, stored)
        ]
        assert relative(decode_slabs(program, passes, programs.open_alone, z), whole) < BUDGET


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_bundled_model_at_several_heights(default_artifact_folder: Path, engine: str) -> None:
    pytest.importorskip(engine)
    check(default_artifact_folder, (3, 4, 5), (1, 3, 8, 0), 1, engine)
    check(default_artifact_folder, (3, 4, 5), (2,), 2, engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("brats_3d", (3, 4, 3)), ("brats_2d", (5, 4)), ("brain_ldm", (2, 3, 2)), ("maisi_rflow", (3, 4, 2))],
)
def test_the_zoo_s_decoders(zoo_artifact: Any, name: str, sizes: tuple[int, ...]) -> None:
    check(zoo_artifact(name), sizes, (1, 5), 1)
    check(zoo_artifact(name), sizes, (2,), 3)


def test_moments_lose_nothing_to_a_large_mean() -> None:
    x = 1e4 + np.random.default_rng(0).standard_normal((2, 6, 5, 7))
    mean, variance = merged(x.mean(-1), x.var(-1), 3)
    grouped = x.reshape(2, 3, -1)
    np.testing.assert_allclose(mean, grouped.mean(-1), rtol=1e-13)
    np.testing.assert_allclose(variance, grouped.var(-1), rtol=1e-9)


def test_a_limit_is_kept_and_the_volume_is_the_same(default_artifact_folder: Path) -> None:
    """In a process of its own, without torch: the peak is where it was foretold, previews included."""
    code = f"""
import sys, numpy as np, volcast
from volcast.runtime.pipeline import load
folder, size = {str(default_artifact_folder)!r}, (12, 16, 12)
kept = load(folder, "onnxruntime", 1, "330MiB")
shown = []
one = kept.sample(0, steps=1, size=size, on_preview=lambda step, images: shown.append(images), preview_every=1)
report = one.report
assert report.decode_slabs > 0, report
assert report.peak_bytes <= 330 * 2**20, report
assert abs(report.predicted_bytes / report.peak_bytes - 1) < 0.15, report
whole = load(folder, "onnxruntime", 1).sample(0, steps=1, size=size)
assert np.linalg.norm(one.array - whole.array) < {BUDGET} * np.linalg.norm(whole.array)
assert np.array_equal(shown[0][0, 0], one.array)
assert "torch" not in sys.modules and "onnx" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_two_latents_are_decoded_one_after_the_other_in_slabs(default_artifact_folder: Path) -> None:
    """Beside two latents' images there is room for slabs alone."""
    spec, opened = read_artifact(default_artifact_folder), open_engine("onnxruntime", 1)
    assert opened.memory is not None
    z = np.random.default_rng(2).standard_normal((2, 4, 4, 4, 4)).astype(np.float32)
    axes = {"batch": 2, "d0": 4, "d1": 4, "d2": 4}
    memory = HostMemory(default_artifact_folder, spec, opened.memory, 2**40)
    least = memory.plan_slabs(axes, 0).peak + 2 * memory.image_bytes(axes)
    assert memory.limit is not None and least < memory.footprint("decode", {**axes, "batch": 1}).peak
    # A twentieth of a limit is kept in reserve; a hundredth more than the least.
    memory.limit = int((memory.base + 1.01 * least) * 20 / 19)
    plan = memory.plan_decode(axes, ())
    assert plan.batch == 0 and plan.slabs > len(plan.passes)
    kept = Programs(default_artifact_folder, spec, opened, memory)
    images = decode(spec, kept, z)
    for image, one in zip(images, z, strict=True):
        alone = decode(spec, Programs(default_artifact_folder, spec, opened), one[None])[0]
        assert relative(image, alone) < BUDGET


def test_two_samples_and_a_limit_that_is_too_low(default_artifact_folder: Path) -> None:
    z = np.random.default_rng(1).standard_normal((2, 4, 8, 8, 8)).astype(np.float32)
    model = load(default_artifact_folder, "onnxruntime", 1, "64GiB")
    whole = model.decode(z)
    model = load(default_artifact_folder, "onnxruntime", 1, 1)
    with pytest.raises(ValueError, match=r"memory_limit=1: .* needs at least \d+ bytes"):
        model.sample_many(1)
    assert whole.shape == (2, 1, 32, 32, 32)
