"""runtime/sampler: spec and request together give the right plan, or an error that names both."""

import numpy as np
import pytest
from pydantic import ValidationError

from volcast import _core
from volcast.runtime.sampler import SamplerConfig, make_plan, make_schedule, noised
from volcast.runtime.spec import NoiseSchedule, SchedulerSpec

SPATIAL = (20, 28, 20)
FLOW = SchedulerSpec(scheduler="rflow", prediction_type="flow", steps=30, use_timestep_transform=True)
LATENT = SchedulerSpec(
    noise_schedule=NoiseSchedule(schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0205)
)


def plan(spec=LATENT, spatial=SPATIAL, **request):
    return make_plan(spec, SamplerConfig(**request), spatial)


@pytest.mark.parametrize(
    ("noise", "wanted"),
    [
        (NoiseSchedule(), _core.linear_beta(1000)),
        (LATENT.noise_schedule, _core.scaled_linear_beta(1000, 0.0015, 0.0205)),
        (
            NoiseSchedule(schedule="sigmoid_beta", num_train_timesteps=50, sig_range=4),
            _core.sigmoid_beta(50, sig_range=4),
        ),
        (NoiseSchedule(schedule="cosine", s=0.01), _core.cosine(1000, 0.01)),
    ],
)
def test_schedules(noise, wanted):
    np.testing.assert_array_equal(make_schedule(noise).betas, wanted.betas)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("method", ["ddim", "ddpm", "pndm", "dpm-solver++"])
def test_any_diffusion_method_fits_a_diffusion_network(method, prediction):
    spec = LATENT.model_copy(update={"prediction_type": prediction})
    if (method, prediction) == ("pndm", "sample"):
        with pytest.raises(ValueError, match=r"\[pndm\] prediction sample"):
            plan(spec, scheduler=method)
        return
    made = plan(spec, scheduler=method, steps=10)
    assert made.method == method and len(made) == (11 if method == "pndm" else 10)


def test_the_artifact_decides_what_the_request_leaves_open():
    assert plan().method == "ddim" and len(plan()) == 50
    assert plan().timesteps[[0, -1]].tolist() == [999, 0]
    assert plan(FLOW).method == "rflow" and len(plan(FLOW)) == 30
    clipped = plan(LATENT.model_copy(update={"clip_sample": True, "clip_sample_max": 3.0}))
    assert (clipped.rows["lo"] == -1).all() and (clipped.rows["hi"] == 3).all()
    large = LATENT.model_copy(update={"scheduler": "ddpm", "variance_type": "fixed_large"})
    assert (plan(large).rows["c"][:-1] > plan(LATENT, scheduler="ddpm").rows["c"][:-1]).all()
    prk = LATENT.model_copy(update={"scheduler": "pndm", "skip_prk_steps": False})
    assert len(plan(prk)) == 59
    open_end = LATENT.model_copy(update={"set_alpha_to_one": False})
    assert plan(open_end).rows["a"][-1] == 1  # from t = 0 to alpha_bar[0]: nothing left to do


def test_the_request_is_heard():
    assert plan(spacing="trailing", steps=10).timesteps.tolist() == [99 + 100 * i for i in range(10)][::-1]
    assert plan(eta=0.3).stochastic and not plan().stochastic
    assert len(plan(start=20)) == 30
    assert (np.diff(plan(reverse=True).timesteps) > 0).all()
    leading = plan(LATENT.model_copy(update={"steps_offset": 1}), spacing="leading")
    assert leading.timesteps[-1] == 1


def test_compat_has_monai_numbers():
    spec = LATENT.model_copy(update={"steps_offset": 1})
    stride = plan(spec, steps=600, compat="monai-1.6")
    assert stride.timesteps.tolist() == _core.monai_linspace(1000, 600, 1)
    alpha_bar = make_schedule(spec.noise_schedule).alphas_cumprod
    t = stride.timesteps[:-1].astype(int)  # 600 steps on a grid of stride 5/3, each going back by 1
    np.testing.assert_allclose(stride.rows["a"][:-1], np.sqrt(alpha_bar[t - 1] / alpha_bar[t]), rtol=1e-14)
    clean = plan(spec, steps=600).timesteps.astype(int)
    wanted = np.sqrt(alpha_bar[clean[1:]] / alpha_bar[clean[:-1]])
    np.testing.assert_allclose(plan(spec, steps=600).rows["a"][:-1], wanted, rtol=1e-14)


@pytest.mark.parametrize(("spatial", "ratio"), [((64, 64, 64), 2.0), ((256, 512), 2.0)])
def test_flow_transform_reads_the_latent(spatial, ratio):
    spec = FLOW.model_copy(
        update={
            "use_discrete_timesteps": False,
            "base_img_size_numel": np.prod(spatial) // int(ratio ** len(spatial)),
        }
    )
    t = 1 - np.arange(30) / 30
    np.testing.assert_allclose(
        plan(spec, spatial).timesteps, 1000 * ratio * t / (1 + (ratio - 1) * t), rtol=1e-14
    )


@pytest.mark.parametrize(
    ("spec", "request_", "message"),
    [
        (FLOW, {"scheduler": "ddim"}, r"scheduler 'ddim' cannot sample .* prediction_type 'flow'"),
        (LATENT, {"scheduler": "rflow"}, r"scheduler 'rflow' cannot sample .* prediction_type 'epsilon'"),
        (
            LATENT,
            {"scheduler": "pndm", "eta": 0.5},
            r"\[sampler\] eta=0.5: pndm has none; leave it out, or take ddim",
        ),
        (FLOW, {"reverse": True}, r"\[sampler\] reverse: rflow has none"),
        (LATENT, {"spacing": "leading", "compat": "monai-1.6"}, r"spacing='leading': monai-1.6 has its own"),
        (FLOW, {"spacing": "leading"}, r"spacing='leading': rflow has its own"),
        (LATENT, {"steps": 1001}, r"steps=1001: need 1..1000"),
        (LATENT, {"start": 50}, r"start=50: need 0..49 with steps=50"),
        (LATENT, {"scheduler": "dpm-solver++", "compat": "monai-1.6"}, r"MONAI has no such scheduler"),
        (FLOW, {"steps": 1001}, r"\[rflow\] steps=1001"),
    ],
)
def test_guards(spec, request_, message):
    with pytest.raises(ValueError, match=message):
        plan(spec, **request_)


@pytest.mark.parametrize(
    "request_", [{"steps": 0}, {"eta": 2}, {"start": -1}, {"spacing": "even"}, {"compat": "1.5"}, {"step": 5}]
)
def test_requests_out_of_range(request_):
    with pytest.raises(ValidationError):
        SamplerConfig(**request_)


@pytest.mark.parametrize("spec", [LATENT, FLOW], ids=["ddim", "rflow"])
def test_noised_starts_an_image_to_image_run(spec):
    """With the exact network for one known x0, a run from the middle ends at x0."""
    ids = np.array([5], np.uint64)
    x0, noise = (_core.normal(ids, ids, step, (1, 3, 4, 5), np.dtype("float64")) for step in (9, 0))
    late = plan(spec, start=12)
    at = late.rows
    x = noised(late, x0, noise)
    np.testing.assert_allclose(x, at["signal"][0] * x0 + at["sigma"][0] * noise, rtol=1e-15)

    def network(step, x, branch):
        eps = (x - at["signal"][step] * x0) / at["sigma"][step]
        return x0 - eps if late.method == "rflow" else eps

    _core.run(late, x, network, ids, ids)
    # 38 rows of 8 operations on values below 5, each dividing by signal or sigma of at least 0.03.
    np.testing.assert_allclose(x, x0, rtol=0, atol=38 * 8 * np.finfo(float).eps * 5 / 0.03)


def test_noised_keeps_dtype_and_refuses_bad_rows():
    x0 = np.ones((1, 2, 2, 2), np.float32)
    assert noised(plan(), x0, x0, row=3).dtype == np.float32
    with pytest.raises(ValueError, match=r"\[noised\] row=50: need 0..49"):
        noised(plan(), x0, x0, row=50)
    with pytest.raises(ValueError, match=r"\[noised\] noise .* is not of x0's shape"):
        noised(plan(), x0, x0[0])
