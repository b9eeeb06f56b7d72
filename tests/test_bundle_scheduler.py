"""Scheduler configs against MONAI's own schedulers, built from the same arguments."""

import inspect

import pytest
from monai.networks import schedulers as monai_schedulers

from volcast.export.bundle_scheduler import read_scheduler, scheduler_name

NAMES = ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "RFlowScheduler"]
NOISE = {"num_train_timesteps", "beta_start", "beta_end", "sig_range", "s", "schedule"}


def read(target, steps=10, dims=3, **arguments):
    return read_scheduler("sch", target, arguments, steps, dims)


@pytest.mark.parametrize("name", NAMES)
def test_a_silent_config_gets_monais_defaults(name):
    spec = read(name)
    for key, parameter in inspect.signature(getattr(monai_schedulers, name)).parameters.items():
        holder = spec.noise_schedule if key in NOISE else spec
        if hasattr(holder, key):
            assert getattr(holder, key) == parameter.default, key


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "DDIMScheduler",
            {
                "schedule": "scaled_linear_beta",
                "beta_start": 0.0015,
                "beta_end": 0.0195,
                "clip_sample": False,
            },
        ),
        ("DDIMScheduler", {"prediction_type": "v_prediction", "steps_offset": 1, "set_alpha_to_one": False}),
        ("DDPMScheduler", {"schedule": "sigmoid_beta", "sig_range": 5.0, "variance_type": "fixed_large"}),
        (
            "DDPMScheduler",
            {"schedule": "cosine", "s": 0.01, "num_train_timesteps": 500, "clip_sample_max": 3.0},
        ),
        ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "epsilon"}),
    ],
)
def test_options_are_what_monai_makes_of_them(name, arguments):
    spec = read(name, **arguments)
    scheduler = getattr(monai_schedulers, name)(**arguments)
    for key in ("num_train_timesteps", "s", "sig_range", "beta_start", "beta_end", "schedule"):
        if key in arguments:
            assert getattr(spec.noise_schedule, key) == arguments[key]
    for key in ("prediction_type", "steps_offset", "clip_sample", "variance_type", "skip_prk_steps"):
        if hasattr(scheduler, key):
            assert getattr(spec, key) == getattr(scheduler, key), key
    if hasattr(scheduler, "clip_sample_values"):
        assert (spec.clip_sample_min, spec.clip_sample_max) == tuple(scheduler.clip_sample_values)
    if hasattr(scheduler, "final_alpha_cumprod"):
        assert spec.set_alpha_to_one == (scheduler.final_alpha_cumprod == 1.0)


def test_rflow_ignores_what_only_training_reads():
    arguments = {"sample_method": "logit-normal", "loc": 0.1, "scale": 1.4, "transform_scale": 2.0}
    assert read("scripts.rectified_flow.RFlowScheduler", **arguments) == read("RFlowScheduler")
    spec = read("RFlowScheduler", use_timestep_transform=True, spatial_dim=3, use_discrete_timesteps=False)
    assert spec.prediction_type == "flow" and spec.use_timestep_transform and not spec.use_discrete_timesteps
    with pytest.raises(ValueError, match="spatial_dim=3: the network has 2"):
        read("RFlowScheduler", dims=2, use_timestep_transform=True)


def test_names_of_the_first_generative_models():
    spec = read(
        "generative.networks.schedulers.ddim.DDIMScheduler", beta_schedule="scaled_linear", beta_start=0.001
    )
    assert (spec.noise_schedule.schedule, spec.noise_schedule.beta_start) == ("scaled_linear_beta", 0.001)


def test_steps_that_the_config_does_not_set():
    assert read("DDPMScheduler", steps=None, num_train_timesteps=300).steps == 300
    assert len(monai_schedulers.DDPMScheduler(num_train_timesteps=300).timesteps) == 300
    with pytest.raises(ValueError, match="--set num_inference_steps=50"):
        read("DDIMScheduler", steps=None)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("DDIMScheduler", {"eta": 1.0}, "option eta=1.0 is not implemented"),
        ("DDIMScheduler", {"skip_prk_steps": True}, "option skip_prk_steps=True"),
        ("DDIMScheduler", {"schedule": "cosine", "beta_start": 0.1}, "option beta_start=0.1"),
        ("DDIMScheduler", {"schedule": "mine"}, "schedule='mine': need one of linear_beta"),
        ("DDIMScheduler", {"beta_start": -1}, "beta_start=-1"),
        ("DDIMScheduler", {"beta_start": "x"}, "beta_start='x'"),
        ("DDIMScheduler", {"prediction_type": "score"}, "prediction_type='score'"),
        ("DDIMScheduler", {"prediction_type": "flow"}, "belong together"),
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type='learned'"),
        ("DDIMScheduler", {"num_train_timesteps": 5}, "num_inference_steps=10: need 1..5"),
        ("EulerScheduler", {}, "_target_='EulerScheduler' is not known; known: DDPMScheduler"),
    ],
)
def test_refusals(name, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(name, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["my.DDIMScheduler", "scripts.ddim.DDIMScheduler", "DDIMSchedulerX"])
def test_foreign_targets_are_not_schedulers(target):
    assert scheduler_name(target) is None
