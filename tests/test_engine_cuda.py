"""The CUDA engine: on a GPU as it ships, elsewhere the same programs, memory plan and C++ loop on the CPU."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import volcast
from volcast.export.similarity import ms_ssim, relative_l2
from volcast.export.to_cuda import build_cuda
from volcast.runtime.artifact import read_artifact
from volcast.runtime.atomic import sha256
from volcast.runtime.device import memory, slab_simulation
from volcast.runtime.device.decoding import Slabs, Whole, open_decoder
from volcast.runtime.device.model import DeviceModel
from volcast.runtime.engine_cuda import CudaEngine
from volcast.runtime.pipeline import Model, load
from volcast.runtime.spec import Precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL, TINY = (4, 8, 4), (4, 4, 4)
# Of a whole trajectory in float32: both engines round otherwise in some 350 operators a step (each 2^-24, grown by at
# most sqrt(operators * steps) where errors are independent), ten times for the network's gain.
SAME = 10 * 2**-24 * np.sqrt(350 * 50)


@pytest.fixture(scope="module")
def model(built: Path) -> Model:
    return load(built, CudaEngine(DEVICE))


@pytest.fixture(scope="module")
def oracle(built: Path) -> Model:
    return load(built, "onnxruntime", 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 4},
        {"steps": 3, "guidance": 2.0},
        {"steps": 5, "scheduler": "pndm"},
        {"steps": 4, "scheduler": "ddpm"},
        {"steps": 4, "scheduler": "dpm-solver++", "guidance": 1.5},
        {"steps": 4, "scheduler": "ddim", "eta": 0.5},
        {"steps": 1},
    ],
)
def test_it_samples_what_onnx_runtime_samples(model: Model, oracle: Model, settings: dict) -> None:
    condition = {"anterior": 0.2, "posterior": 0.9}
    ours = model.sample(5, size=SMALL, condition=condition, **settings)
    theirs = oracle.sample(5, size=SMALL, condition=condition, **settings)
    assert relative_l2(ours.array, theirs.array) < SAME
    assert np.abs(theirs.array).max() > 0.1
    assert ours.report is not None and ours.report.engine == "cuda" and ours.report.device_bytes > 2**20


def test_the_default_size(model: Model, oracle: Model) -> None:
    assert relative_l2(model.sample(1, steps=2).array, oracle.sample(1, steps=2).array) < SAME


def test_a_sample_s_bits_depend_on_nothing_but_its_key(model: Model) -> None:
    together = list(model.sample_many(5, 3, batch=5, size=TINY, steps=2))
    alone = list(model.sample_many(5, 3, batch=1, size=TINY, steps=2))
    apart = list(model.sample_many(5, 3, batch=3, size=TINY, steps=2))
    for one, other, third in zip(together, alone, apart, strict=True):
        np.testing.assert_array_equal(one.array, other.array)
        np.testing.assert_array_equal(one.array, third.array)
    assert not np.array_equal(together[0].array, together[1].array)
    guided = list(model.sample_many(2, 3, batch=2, size=TINY, steps=2, guidance=2.0))
    for one, other in zip(guided, model.sample_many(2, 3, size=TINY, steps=2, guidance=2.0), strict=True):
        np.testing.assert_array_equal(one.array, other.array)


def test_conditions_differ_within_a_batch(model: Model) -> None:
    conditions = [{"anterior": 0.1}, {"anterior": 0.9}]
    both = list(model.sample_many(2, 0, batch=2, size=SMALL, steps=2, condition=conditions))
    for number, condition in enumerate(conditions):
        one = list(model.sample_many(2, 0, size=SMALL, steps=2, condition=condition))[number]
        np.testing.assert_array_equal(both[number].array, one.array)


def test_an_image_to_start_from(model: Model, oracle: Model) -> None:
    image = oracle.sample(2, size=SMALL, steps=2).array
    arguments = {"image": image, "strength": 0.5, "steps": 4}
    assert relative_l2(model.sample(4, **arguments).array, oracle.sample(4, **arguments).array) < SAME


def test_steps_are_told_and_a_raise_stops_them(model: Model) -> None:
    told: list[tuple[int, int]] = []
    with_callback = model.sample(6, size=SMALL, steps=4, on_step=lambda *place: told.append(place))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def cancel(done: int, total: int) -> None:
        if done == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        model.sample(6, size=SMALL, steps=200, on_step=cancel)
    np.testing.assert_array_equal(model.sample(6, size=SMALL, steps=4).array, with_callback.array)


def test_previews_show_the_way_and_change_nothing(model: Model, oracle: Model) -> None:
    shown: dict[int, np.ndarray] = {}
    arguments = {"size": SMALL, "steps": 6, "preview_every": 3}
    volume = model.sample(8, on_preview=lambda step, images: shown.update({step: images}), **arguments)
    np.testing.assert_array_equal(volume.array, model.sample(8, size=SMALL, steps=6).array)
    wanted: dict[int, np.ndarray] = {}
    oracle.sample(8, on_preview=lambda step, images: wanted.update({step: images}), **arguments)
    assert sorted(wanted) == [3, 6]
    assert shown and set(shown) <= {3, 6}  # one that is still being decoded makes the next one drop out
    for step, images in shown.items():
        assert images.shape == (1, 1, *(4 * size for size in SMALL))
        assert relative_l2(images, wanted[step]) < SAME


def test_decode_and_encode(model: Model, oracle: Model) -> None:
    z = np.random.default_rng(0).standard_normal((2, 4, *SMALL)).astype(np.float32)
    image = oracle.decode(z)
    assert relative_l2(model.decode(z), image) < SAME
    assert relative_l2(model.encode(image), oracle.encode(image)) < SAME


def test_a_memory_limit_decodes_in_slabs_with_the_whole_s_statistics(built: Path) -> None:
    size = (8, 16, 8)
    whole = load(built, CudaEngine(DEVICE)).sample(9, size=size, steps=2)
    assert whole.report is not None
    limit = int(0.8 * whole.report.device_bytes)
    bounded = load(built, CudaEngine(DEVICE, memory_limit=limit)).sample(9, size=size, steps=2)
    assert bounded.report is not None and bounded.report.device_bytes <= limit
    assert relative_l2(bounded.array, whole.array) < 1e-4
    with pytest.raises(ValueError, match="no previews where memory makes the decode run in slabs"):
        load(built, CudaEngine(DEVICE, memory_limit=limit)).sample(
            9, size=size, steps=2, on_preview=lambda step, images: None
        )
    with pytest.raises(ValueError, match="memory_limit"):
        load(built, CudaEngine(DEVICE, memory_limit=2**20)).sample(9, size=size, steps=2)


def test_the_whole_is_decoded_where_it_just_fits(built: Path) -> None:
    spec, model = read_artifact(built), DeviceModel(built, torch.device(DEVICE))
    latent = (4, *SMALL)
    whole = open_decoder(spec, model, latent, None)
    assert isinstance(open_decoder(spec, model, latent, whole.bytes), Whole)
    less = open_decoder(spec, model, latent, whole.bytes - 1)
    assert isinstance(less, Slabs) and less.bytes < whole.bytes


def test_a_volume_past_32_bits_is_decoded_in_slabs(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, model = read_artifact(built), DeviceModel(built, torch.device(DEVICE))
    latent = (4, *SMALL)
    given = model.described({"z": (spec.programs["decode"].inputs[0], (1, *latent))})
    shapes = memory.shapes(model.program("decode"), model.weights("decode"), given)
    largest = max(math.prod(shape) for shape, _ in shapes.values())
    # As if the largest tensor just had 2^31 elements, and then one less.
    monkeypatch.setattr(slab_simulation, "MOST_ELEMENTS", largest)
    cut = open_decoder(spec, model, latent, None)
    monkeypatch.setattr(slab_simulation, "MOST_ELEMENTS", largest + 1)
    whole = open_decoder(spec, model, latent, None)
    assert isinstance(cut, Slabs) and isinstance(whole, Whole)
    z = torch.randn(1, *latent, device=model.device)
    assert relative_l2(cut(z).cpu().numpy(), whole(z).cpu().numpy()) < 1e-5


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_half_precisions(built: Path, oracle: Model, tmp_path: Path, precision: Precision) -> None:
    folder = tmp_path / "half"
    shutil.copytree(built, folder, ignore=shutil.ignore_patterns("engines"))
    build_cuda(folder, precision=precision)
    size = None if DEVICE == "cuda" else TINY  # PyTorch's half convolutions are ten times slower on a CPU
    ours = load(folder, CudaEngine(DEVICE)).sample(5, size=size, steps=3)
    theirs = oracle.sample(5, size=size, steps=3)
    # 350 operators a step round independently, each by half an eps.
    unit = 2.0**-11 if precision is Precision.FP16 else 2.0**-8
    assert relative_l2(ours.array, theirs.array) < unit * np.sqrt(350 * 3)
    if precision is Precision.FP16:
        assert ms_ssim(ours.array[None, None], theirs.array[None, None]) > 0.995


def test_values_that_are_not_finite_are_named(built: Path) -> None:
    model = load(built, CudaEngine(DEVICE))
    with pytest.raises(ValueError, match=r"\[loop\] step 0 \(t=999\), sample 0: .* not finite"):
        model.sample(0, size=SMALL, steps=3, condition={"context": [[1e38, 1e38, 1e38]]})
    assert np.isfinite(model.sample(0, size=SMALL, steps=2).array).all()


def test_programs_that_are_missing_or_another_s(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(built, folder)
    manifest = folder / "engines" / "cuda" / "programs.json"
    content = json.loads(manifest.read_text())
    for changed, message in [
        ({"artifact": "0" * 64}, "was built from another export"),
        ({"format": 99}, "format"),
        ({"weights_sha256": "0" * 64}, "weights.safetensors is missing or was altered"),
        ({"code": "import os"}, "code"),
    ]:
        manifest.write_text(json.dumps({**content, **changed}))
        with pytest.raises(ValueError, match=f"{message}.*run `volcast build --target cuda` again"):
            load(folder, CudaEngine(DEVICE))
    weights = manifest.with_name("weights.safetensors")
    weights.write_bytes(b"no tensors")
    manifest.write_text(json.dumps({**content, "weights_sha256": sha256(weights)}))
    with pytest.raises(
        ValueError, match=r"weights.safetensors: .*header.*run `volcast build --target cuda` again"
    ):
        load(folder, CudaEngine(DEVICE))
    manifest.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="recursion depth.*run `volcast build --target cuda` again"):
        load(folder, CudaEngine(DEVICE))
    shutil.rmtree(folder / "engines")
    with pytest.raises(ValueError, match=r"holds no programs.json; run `volcast build --target cuda`"):
        load(folder, CudaEngine(DEVICE))


def test_an_engine_shares_weights_but_not_those_of_an_older_build(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(built, folder)
    engine = CudaEngine(DEVICE)
    one, other = load(folder, engine), load(folder, engine)
    assert one._sampler._model is other._sampler._model
    programs = folder / "engines" / "cuda" / "programs.json"
    programs.write_text(programs.read_text() + " ")
    again = load(folder, engine)
    assert again._sampler._model is not one._sampler._model
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"ddim"', '"ddpm"'))  # exported anew, and not built
    programs.write_text(programs.read_text() + " ")
    with pytest.raises(ValueError, match="was built from another export"):
        load(folder, engine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_engine_says_so_when_asked(built: Path) -> None:
    with pytest.raises(ValueError, match=r"\[cuda\] (PyTorch .* without CUDA|no NVIDIA GPU)"):
        volcast.load(built, engine="cuda")


def test_bad_devices_and_limits(built: Path) -> None:
    for device in ("meta", "graphics card", "cuda:-1", "", None):
        with pytest.raises(ValueError, match="need cuda, cuda:0 .. or cpu"):
            CudaEngine(device)  # type: ignore[arg-type]
    for limit in (0, -1, "2 parsecs"):
        with pytest.raises(ValueError, match=f"memory_limit={limit!r}: need a number of bytes"):
            CudaEngine(DEVICE, memory_limit=limit)
    image = np.zeros((16, 32, 16), np.float32)
    with pytest.raises(ValueError, match="memory_limit=47185920: encode at once takes .*; raise the limit"):
        load(built, CudaEngine(DEVICE, memory_limit="45MiB")).encode(image)
    with pytest.raises(ValueError, match="memory_limit='2 parsecs': need a number of bytes"):
        volcast.load(built, engine="cuda", memory_limit="2 parsecs")
