"""csrc/plan* with monai=True: MONAI 1.6.1's own schedulers, faults included, step by step in float64."""

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, PNDMScheduler, RFlowScheduler

from volcast import _core

F64 = np.dtype("float64")
SEED, SAMPLE = np.array([11], np.uint64), np.array([3], np.uint64)
SHAPE = [2, 5, 7]
SCHEDULE = _core.linear_beta(1000)
PREDICTION, VARIANCE = _core.Prediction, _core.Variance
# As in test_plan.py: 8 operations a row, each off by eps64 times 1/sqrt(alpha_bar[T-1]) = 157.
CLOSE = 8 * np.finfo(F64).eps / np.sqrt(SCHEDULE.alphas_cumprod[-1])


def normal(step=0):
    return _core.normal(SEED, SAMPLE, step, SHAPE, F64)


def network(x, t):
    return np.tanh(0.7 * x) + 0.1 * np.cos(t / 100)


def trace(plan):
    x, states = normal(), []

    def call(step, x, branch):
        states.append(x.copy())
        return network(x, plan.timesteps[step])

    _core.run(plan, x, call, SEED, SAMPLE)
    return np.array([*states, x])


def assert_close(ours, theirs):
    theirs = np.array(theirs)
    assert ours.shape == theirs.shape
    rows = np.arange(1, len(theirs) + 1)
    largest = np.maximum.accumulate(np.abs(theirs).reshape(len(theirs), -1).max(axis=1))
    error = np.abs(ours - theirs).reshape(len(theirs), -1).max(axis=1)
    assert (error <= CLOSE * rows * largest).all(), (
        f"first off before row {np.argmax(error > CLOSE * rows * largest)}"
    )


def in_float64(scheduler, to_one=True):
    scheduler.betas = torch.from_numpy(SCHEDULE.betas)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.from_numpy(SCHEDULE.alphas_cumprod)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    final = 1.0 if to_one else SCHEDULE.alphas_cumprod[0]
    scheduler.final_alpha_cumprod = torch.tensor(final, dtype=torch.float64)
    return scheduler


def monai_trace(timesteps, step):
    states = [normal()]
    for t in timesteps:
        output = torch.from_numpy(network(states[-1], float(t)))
        states.append(step(output, int(t), torch.from_numpy(states[-1]))[0].numpy())
    return states


@pytest.fixture
def our_noise(monkeypatch):
    """torch.randn gives the noise of rows 0, 1, ... of our streams."""
    calls = iter(range(1, 2000))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.from_numpy(normal(next(calls))))


@pytest.mark.parametrize("clip", [None, (-0.5, 0.9)], ids=["plain", "clip"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("prediction", list(PREDICTION))
def test_ddim(our_noise, prediction, eta, clip):
    low, high = clip or (-1, 1)
    scheduler = DDIMScheduler(
        prediction_type=prediction.name.lower(),
        clip_sample=clip is not None,
        clip_sample_min=low,
        clip_sample_max=high,
    )
    in_float64(scheduler).set_timesteps(30)
    plan = _core.make_ddim(SCHEDULE, _core.Steps(30, monai=True), prediction, clip=clip, eta=eta)
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    theirs = monai_trace(scheduler.timesteps, lambda out, t, x: scheduler.step(out, t, x, eta=eta))
    assert_close(trace(plan), theirs)


# 600 and 501: the grid has stride 2 and the step stride 1 (section 0, row 2 of the reference on MONAI).
@pytest.mark.parametrize(
    ("steps", "offset", "to_one"), [(600, 0, True), (501, 1, False), (1, 0, True), (1000, 0, False)]
)
def test_ddim_grid(steps, offset, to_one):
    scheduler = in_float64(DDIMScheduler(steps_offset=offset, clip_sample=False), to_one)
    scheduler.set_timesteps(steps)
    asked = _core.Steps(steps, steps_offset=offset, set_alpha_to_one=to_one, monai=True)
    plan = _core.make_ddim(SCHEDULE, asked, PREDICTION.V_PREDICTION)
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    scheduler.prediction_type = "v_prediction"
    assert_close(trace(plan), monai_trace(scheduler.timesteps, scheduler.step))


@pytest.mark.parametrize("prediction", list(PREDICTION))
def test_reversed_step(prediction):
    scheduler = in_float64(DDIMScheduler(prediction_type=prediction.name.lower(), clip_sample=False))
    scheduler.set_timesteps(25)
    plan = _core.make_ddim(SCHEDULE, _core.Steps(25, monai=True), prediction, reverse=True)
    upwards = scheduler.timesteps.flip(0)[:-1]  # from T - 1 MONAI's index leaves the table
    assert plan.timesteps.tolist() == upwards.tolist()
    with pytest.raises(IndexError):
        scheduler.reversed_step(torch.zeros(1), 999, torch.zeros(1))
    assert_close(trace(plan), monai_trace(upwards, scheduler.reversed_step))


@pytest.mark.parametrize("clip", [None, (-0.5, 0.9)], ids=["plain", "clip"])
@pytest.mark.parametrize("variance", list(VARIANCE))
@pytest.mark.parametrize("prediction", list(PREDICTION))
def test_ddpm(our_noise, prediction, variance, clip):
    low, high = clip or (-1, 1)
    scheduler = DDPMScheduler(
        prediction_type=prediction.name.lower(),
        variance_type=variance.name.lower(),
        clip_sample=clip is not None,
        clip_sample_min=low,
        clip_sample_max=high,
    )
    in_float64(scheduler).set_timesteps(30)
    plan = _core.make_ddpm(SCHEDULE, _core.Steps(30, monai=True), prediction, clip=clip, variance=variance)
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    assert_close(trace(plan), monai_trace(scheduler.timesteps, scheduler.step))


PNDM = [
    (50, False, 0),
    (1000, False, 0),
    (4, False, 0),
    (125, False, 3),
    (50, True, 1),
    (1, True, 0),
    (2, True, 0),
]


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("prediction", [PREDICTION.EPSILON, PREDICTION.V_PREDICTION])
@pytest.mark.parametrize(("steps", "skip", "offset"), PNDM)
def test_pndm(steps, skip, offset, prediction, to_one):
    scheduler = PNDMScheduler(
        prediction_type=prediction.name.lower(), skip_prk_steps=skip, steps_offset=offset
    )
    in_float64(scheduler, to_one).set_timesteps(steps)
    asked = _core.Steps(steps, steps_offset=offset, set_alpha_to_one=to_one, monai=True)
    plan = _core.make_pndm(SCHEDULE, asked, prediction, skip_prk_steps=skip)
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    assert_close(trace(plan), monai_trace(scheduler.timesteps, scheduler.step))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pndm_too_short_for_runge_kutta(steps):
    with pytest.raises(ValueError):  # MONAI: shapes of the timesteps do not broadcast, or no history
        scheduler = in_float64(PNDMScheduler())
        scheduler.set_timesteps(steps)
        monai_trace(scheduler.timesteps, scheduler.step)
    with pytest.raises(ValueError, match=rf"\[pndm\] steps={steps} .*need 4 or more; use skip_prk_steps"):
        _core.make_pndm(SCHEDULE, _core.Steps(steps, monai=True), PREDICTION.EPSILON, skip_prk_steps=False)


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("numel", [None, 64**3, 20 * 28 * 20])
@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("steps", [1, 30, 129])
def test_rflow(steps, discrete, numel, offset):
    scheduler = RFlowScheduler(
        use_discrete_timesteps=discrete, use_timestep_transform=numel is not None, steps_offset=offset
    )
    scheduler.set_timesteps(steps, input_img_size_numel=numel)
    plan = _core.make_rflow(
        steps,
        use_discrete_timesteps=discrete,
        use_timestep_transform=numel is not None,
        input_img_size_numel=numel or 1,
        steps_offset=offset,
        monai=True,
    )
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    later = [*scheduler.timesteps[1:], torch.tensor(0)]
    states = [normal()]
    for t, then in zip(scheduler.timesteps, later, strict=True):
        output = torch.from_numpy(network(states[-1], float(t)))
        states.append(scheduler.step(output, t, torch.from_numpy(states[-1]), then)[0].numpy())
    # t and T are exact; dt = (t - next) / T is a Python float in MONAI too.
    assert_close(trace(plan), states)


def test_rflow_real_config_overshoots():
    """MAISI's rflow (64^3 latent, 30 steps): the time steps add up to 1.0096 in MONAI, to 1 in the clean plan."""
    arguments = {
        "use_discrete_timesteps": False,
        "use_timestep_transform": True,
        "input_img_size_numel": 64**3,
    }
    assert abs(_core.make_rflow(30, **arguments, monai=True).rows["d"].sum() - 1.0096) < 5e-5
    assert abs(_core.make_rflow(30, **arguments).rows["d"].sum() - 1) < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: _core.make_dpm_solver(SCHEDULE, _core.Steps(10, monai=True), PREDICTION.EPSILON),
            "no such scheduler",
        ),
        (
            lambda: _core.make_ddim(SCHEDULE, _core.Steps(1, monai=True), PREDICTION.EPSILON, reverse=True),
            r"\[ddim\] steps=1: MONAI's reversed_step needs at least 2",
        ),
        (
            lambda: _core.make_pndm(
                SCHEDULE, _core.Steps(10, start=1, monai=True), PREDICTION.EPSILON, skip_prk_steps=False
            ),
            r"start=1: MONAI 1.6.1 cannot start late",
        ),
        (
            lambda: _core.make_pndm(
                SCHEDULE, _core.Steps(1000, steps_offset=1, monai=True), PREDICTION.EPSILON
            ),
            r"steps_offset=1 with steps=1000: the first timestep is 1000",
        ),
        (lambda: _core.make_rflow(10, train_timesteps=70000, monai=True), r"float16, need at most 65504"),
    ],
)
def test_what_monai_cannot_run(call, message):
    with pytest.raises(ValueError, match=message):
        call()
