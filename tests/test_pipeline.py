"""Sampling an artifact end to end, against the closed form of its denoiser (see conftest)."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import volcast
from volcast import _core
from volcast.runtime.pipeline import Model, load
from volcast.runtime.volume import Volume

STEPS = 1000
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, STEPS))
HALF_ULP = 2.0**-24


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def model(request: pytest.FixtureRequest, gaussian: Path) -> Model:
    pytest.importorskip(request.param)
    return load(gaussian, engine=request.param, threads=1)


def upsampled(latent: np.ndarray) -> np.ndarray:
    image = latent.mean(0) / 0.5
    return image.repeat(2, 0).repeat(2, 1).repeat(2, 2)


def ddim(x: np.ndarray, mean: float, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DDIM (arXiv:2010.02502 Eq. 12, eta 0) in float64, and a first-order bound on the rounding of a float32 run.

    Each step x' = A x + B eps, eps = k x + c m, rounds x' once, eps twice, k and c once: 3 roundings of each product.
    """
    bound = np.zeros_like(x)
    for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        a = ALPHA_BAR[int(t)]
        b = 1.0 if after is None else ALPHA_BAR[int(after)]
        below = 0.25 * a + 1 - a
        k = np.sqrt(1 - a) / below
        eps = k * x - np.sqrt(a * (1 - a)) / below * mean
        first, second = np.sqrt(b / a), np.sqrt(1 - b) - np.sqrt(b * (1 - a) / a)
        parts = np.abs(k * x) + np.abs(np.sqrt(a * (1 - a)) / below * mean)
        bound = abs(first + second * k) * bound + 3 * HALF_ULP * (abs(second) * parts + abs(x * first))
        x = first * x + second * eps
        bound += HALF_ULP * np.abs(x)
    return x, bound


def noise(seed: int, sample: int, shape: tuple[int, ...] = (2, 4, 6, 4)) -> np.ndarray:
    return _core.normal(np.array([seed], np.uint64), np.array([sample], np.uint64), 0, shape, np.dtype("f4"))[
        0
    ]


@pytest.mark.parametrize("steps", [1, 10, 50, 1000])
def test_ddim_is_the_closed_form(model: Model, steps: int) -> None:
    volume = model.sample(7, steps=steps, condition={"anterior": 1.0, "posterior": 0.5, "ratio": 0.1})
    timesteps = np.rint(np.linspace(STEPS - 1, 0, steps))
    x, bound = ddim(noise(7, 0).astype(np.float64), 1.0 - 0.5 + 10 * 0.1, timesteps)
    # Averaging the channels cannot enlarge the bound; it rounds twice more, and dividing by 0.5 doubles both.
    tolerance = upsampled(bound) + 4 * HALF_ULP * np.abs(upsampled(np.abs(x)))
    assert volume.array.shape == (8, 12, 8)
    assert (np.abs(volume.array - upsampled(x)) <= tolerance).all()
    assert tolerance.max() < 1e-3


def test_the_samples_have_the_data_s_mean_and_deviation(model: Model) -> None:
    volumes = list(
        model.sample_many(24, batch=4, steps=50, scheduler="dpm-solver++", condition={"ratio": 0.0})
    )
    values = np.stack([volume.array[::2, ::2, ::2] for volume in volumes])
    # Two channels of deviation 0.5, averaged and divided by 0.5: deviation 0.707 of 2304 values, mean 2 (0.5 - 0.25).
    # Five standard errors of mean and deviation; the solver's own bias on the deviation is under 2 %.
    assert abs(values.mean() - 0.5) < 5 * 0.707 / np.sqrt(values.size)
    assert abs(values.std() / 0.707 - 1) < 0.02 + 5 / np.sqrt(2 * values.size)


def test_guidance_moves_the_mean_as_its_formula_says(model: Model) -> None:
    # eps is linear in m, so u + w (c - u) is the denoiser of mean m_u + w (m_c - m_u); m_u = -1 + 1 - 10.
    guided = model.sample(1, steps=20, guidance=2.5, condition={"context": [[0.2, 0.1, 0.3]]})
    timesteps = np.rint(np.linspace(STEPS - 1, 0, 20))
    start, conditional, unconditional, w = noise(1, 0).astype(np.float64), 0.2 - 0.1 + 3, -10, 2.5
    x, _ = ddim(start, unconditional + w * (conditional - unconditional), timesteps)
    # Each branch rounds on its own and weighs w and w - 1: at most 2 w - 1 times a run with the sum of magnitudes.
    _, bound = ddim(np.abs(start), (w - 1) * abs(unconditional) + w * conditional, timesteps)
    tolerance = (2 * w - 1) * upsampled(bound)
    assert (np.abs(guided.array - upsampled(x)) <= tolerance).all()
    assert tolerance.max() < 0.02 < np.abs(guided.array).max() / 1000


def test_a_sample_does_not_depend_on_its_batch(model: Model) -> None:
    alone = [v.array for v in model.sample_many(5, 3, steps=8, scheduler="ddpm")]
    together = [v.array for v in model.sample_many(5, 3, batch=3, steps=8, scheduler="ddpm")]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    assert np.array_equal(model.sample(3, steps=8, scheduler="ddpm").array, alone[0])
    assert not np.array_equal(alone[0], alone[1])


def test_conditions_may_differ_within_a_batch(model: Model) -> None:
    given = [{"anterior": 0.0}, {"anterior": 1.0}]
    both = [v.array for v in model.sample_many(2, batch=2, steps=5, condition=given)]
    second = list(model.sample_many(2, steps=5, condition=given[1]))[1]
    assert np.array_equal(both[1], second.array)


def test_another_size(model: Model) -> None:
    volume = model.sample(2, steps=3, size=(2, 8, 6))
    assert volume.array.shape == (4, 16, 12)
    np.testing.assert_allclose(volume.affine @ [1.5, 7.5, 5.5, 1], [0, 0, 0, 1], atol=1e-12)


def test_encode_undoes_decode(model: Model) -> None:
    z = np.repeat(noise(0, 0)[:1], 2, axis=0)
    # Both averages are of equal numbers; the scale factor is a power of two.
    np.testing.assert_allclose(model.encode(model.decode(z)[0, 0])[0], z, rtol=4 * HALF_ULP)


def test_image_to_image_starts_at_its_strength(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    image = np.full((8, 12, 8), 3.0, np.float32)
    volume = model.sample(5, steps=20, image=image, strength=0.25, on_step=lambda *done: seen.append(done))
    assert seen == [(i, 5) for i in range(1, 6)]
    timesteps = np.rint(np.linspace(STEPS - 1, 0, 20))[15:]
    a = ALPHA_BAR[int(timesteps[0])]
    x = np.sqrt(a) * 1.5 + np.sqrt(1 - a) * noise(5, 0).astype(np.float64)
    mean = 0.5 - 0.25 + 10 * (1 + 2 * 0.25) / (2 + 2 * 0.25 + 4 * 0.5)
    expected, bound = ddim(x, mean, timesteps)
    tolerance = upsampled(bound) + 8 * HALF_ULP * upsampled(np.abs(expected) + np.abs(x))
    assert (np.abs(volume.array - upsampled(expected)) <= tolerance).all()


def test_a_volume_passes_its_affine_on(model: Model) -> None:
    affine = np.array([[0.8, -0.9, 0, 5], [0.6, 1.2, 0, 6], [0, 0, 2, 7], [0, 0, 0, 1.0]])
    image = Volume(np.zeros((8, 12, 8), np.float32), affine, (1.0, 1.5, 2.0))
    volume = model.sample(image=image, strength=0.1)
    np.testing.assert_array_equal(volume.affine, affine)
    for turned, message in (
        (np.diag([-1, 1.5, 2, 1]), "axes LAS: need RAS"),
        (np.diag([2, 1.5, 2, 1]), "voxels of 2 x 1.5 x 2 mm: the model has 1 x 1.5 x 2"),
    ):
        spacing = tuple(float(one) for one in np.abs(np.diag(turned))[:3])
        with pytest.raises(ValueError, match=message):
            model.sample(image=Volume(image.array, turned.astype(np.float64), spacing), strength=0.1)


def test_both_engines_give_the_same_numbers(gaussian: Path) -> None:
    pytest.importorskip("openvino")
    one, two = (load(gaussian, engine=name).sample(4, steps=20).array for name in ("openvino", "onnxruntime"))
    # Both are within the bound of the closed form (above), which is under 1e-3; in practice a few ulp.
    np.testing.assert_allclose(one, two, atol=1e-4)


def test_same_seed_same_bits_after_opening_again(model: Model, gaussian: Path) -> None:
    again = load(gaussian, engine=model.engine.name, threads=1)
    assert np.array_equal(model.sample(9).array, again.sample(9).array)


def test_the_report_adds_up(model: Model) -> None:
    report = model.sample(0, steps=30, size=(8, 8, 8)).report
    assert report is not None and report.steps == 30 and report.scheduler == "ddim" and report.batch == 1
    assert 0 < report.network_seconds < report.loop_seconds < report.total_seconds
    assert report.open_seconds > 0 and model.sample(0, steps=30, size=(8, 8, 8)).report.open_seconds == 0
    assert 2**24 < report.peak_bytes < 2**36


def test_steps_are_counted_over_all_batches_and_an_error_stops(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    list(model.sample_many(3, batch=2, steps=2, on_step=lambda *done: seen.append(done)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.sample(on_step=stop)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"steps=0: need 1\.\.1000"),
        ({"steps": 1001}, r"steps=1001: need 1\.\.1000"),
        ({"steps": 2.5}, r"steps=2\.5: need"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed="),
        ({"scheduler": "euler"}, "scheduler='euler'.*'ddim'"),
        ({"scheduler": "rflow"}, "rflow.*epsilon"),
        ({"compat": "monai-2"}, "compat='monai-2'"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"guidance": -1}, "guidance=-1"),
        ({"strength": 0.5}, "strength=0.5 without an image"),
        ({"step": 3}, "unknown setting step; known: steps"),
        ({"size": (4, 5, 4)}, r"d1=5: need 2\.\.16 and a multiple of 2; nearest: 4 or 6"),
        ({"size": (4, 4)}, "need 3 numbers"),
        ({"size": (4, 4, 400)}, "d2=400.*nearest: 16"),
        ({"condition": {"anterio": 1}}, "did you mean 'anterior'"),
        ({"batch": 0}, "batch=0"),
        ({"n": 8, "batch": 8}, r"batch=8: need 1\.\.4; nearest: 4"),
        ({"n": 0}, "n=0"),
        ({"n": 2, "condition": [{}]}, "1 conditions for 2 samples"),
        ({"image": np.zeros((8, 8)), "strength": 0.5}, r"\[encode\] got float64"),
        ({"image": np.zeros((8, 8, 7)), "strength": 0.5}, "o2=7.*nearest: 4 or 8"),
        ({"image": np.zeros((2, 1, 8, 12, 8))}, "image holds 2 images"),
        ({"image": np.zeros((8, 12, 8)), "size": (4, 4, 4)}, r"latent is \(4, 6, 4\); leave size out"),
        ({"image": np.full((8, 8, 8), np.nan)}, "NaN"),
    ],
)
def test_bad_requests_fail_before_the_first_volume_is_asked_for(model: Model, arguments, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        model.sample_many(**{"n": 1, **arguments})
    assert "\n" not in str(error.value)


def test_weights_that_overflow_are_told(gaussian: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from volcast.runtime.artifact import digests

    folder = tmp_path / "artifact"
    shutil.copytree(gaussian, folder)
    program = onnx.load(folder / "schedule.onnx")
    table = program.graph.initializer[0]
    table.raw_data = np.full((STEPS, 2), np.nan, np.float32).tobytes()
    onnx.save(program, folder / "schedule.onnx")
    old, new = (digests(path)["schedule.onnx"] for path in (gaussian, folder))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(old, new))
    with pytest.raises(ValueError, match="not finite; check the weights"):
        load(folder, engine="onnxruntime").sample()


def test_sampling_imports_neither_torch_nor_monai(gaussian: Path) -> None:
    code = (
        "import sys, volcast\n"
        f"volcast.load({str(gaussian)!r}).sample(steps=2).save({str(gaussian.parent / 'out.nii.gz')!r})\n"
        "heavy = {'torch', 'monai', 'onnx', 'onnxscript', 'openvino_telemetry.main'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_offers_load_and_volume() -> None:
    assert volcast.load is load
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = volcast.lod


def test_numpy_integers_are_numbers(gaussian: Path) -> None:
    model = load(gaussian, engine="onnxruntime")
    size = np.array(model.spec.latent_shape[1:])
    given = model.sample(np.int64(3), steps=np.int64(2), size=size)
    np.testing.assert_array_equal(given.array, model.sample(3, steps=2).array)
