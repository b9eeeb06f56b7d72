"""csrc/plan*: every method in its clean definition against diffusers, step by step in float64."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

from volcast import _core

F64 = np.dtype("float64")
SEED, SAMPLE = np.array([11], np.uint64), np.array([3], np.uint64)
SHAPE = [2, 5, 7]
SCHEDULE = _core.scaled_linear_beta(1000, 0.0015, 0.0195)
ALPHA_BAR = SCHEDULE.alphas_cumprod
SPACING, PREDICTION, VARIANCE = _core.Spacing, _core.Prediction, _core.Variance
EVERY_PREDICTION = [pytest.param(p, id=p.name.lower()) for p in PREDICTION]
# An update rounds terms up to 1/sqrt(alpha_bar[T-1]) = 37 times the state; the network is 1-Lipschitz. Then over
# rows: 8 operations a row, each off by eps64 times that.
CLOSE = 8 * np.finfo(F64).eps / np.sqrt(ALPHA_BAR[-1])


def normal(step=0):
    return _core.normal(SEED, SAMPLE, step, SHAPE, F64)


def network(x, t):
    return np.tanh(0.7 * x) + 0.1 * np.cos(t / 100)


def trace(plan, x, network=network):
    """x before every row, then the result: [rows + 1, N, ...]."""
    x, states = x.copy(), []

    def call(step, x, branch):
        assert branch is _core.Branch.CONDITIONAL
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


def in_float64(scheduler):
    """The same scheduler with our float64 tables."""
    scheduler.betas = torch.from_numpy(SCHEDULE.betas)
    scheduler.alphas_cumprod = torch.from_numpy(ALPHA_BAR)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    if hasattr(scheduler, "final_alpha_cumprod"):
        final = 1.0 if scheduler.config.set_alpha_to_one else ALPHA_BAR[0]
        scheduler.final_alpha_cumprod = torch.tensor(final, dtype=torch.float64)
    return scheduler


def diffusers_trace(scheduler, x, **arguments):
    states = [x]
    for i, t in enumerate(scheduler.timesteps):
        output = torch.from_numpy(network(states[-1], float(t)))
        extra = {name: value(i) for name, value in arguments.items()}
        states.append(scheduler.step(output, t, torch.from_numpy(states[-1]), **extra).prev_sample.numpy())
    return states


@pytest.mark.parametrize("clip", [None, (-0.8, 0.8)], ids=["plain", "clip"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", EVERY_PREDICTION)
def test_ddim(prediction, eta, clip):
    scheduler = in_float64(
        diffusers.DDIMScheduler(
            prediction_type=prediction.name.lower(), clip_sample=clip is not None, clip_sample_range=0.8
        )
    )
    scheduler.set_timesteps(20)
    plan = _core.make_ddim(SCHEDULE, _core.Steps(20, spacing=SPACING.LEADING), prediction, clip=clip, eta=eta)
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    noise = (lambda i: torch.from_numpy(normal(i + 1))) if eta else (lambda i: None)
    theirs = diffusers_trace(scheduler, normal(), eta=lambda i: eta, variance_noise=noise)
    assert_close(trace(plan, normal()), theirs)


@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_offset_and_final_alpha(to_one):
    scheduler = in_float64(
        diffusers.DDIMScheduler(steps_offset=1, set_alpha_to_one=to_one, clip_sample=False)
    )
    scheduler.set_timesteps(25)
    steps = _core.Steps(25, spacing=SPACING.LEADING, steps_offset=1, set_alpha_to_one=to_one)
    plan = _core.make_ddim(SCHEDULE, steps, PREDICTION.EPSILON)
    theirs = diffusers_trace(scheduler, normal())
    assert plan.timesteps[-1] == 1
    assert_close(trace(plan, normal()), theirs)


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 999, 1000])
@pytest.mark.parametrize("spacing", list(SPACING))
def test_ddim_goes_to_the_next_listed_timestep(spacing, steps):
    """arXiv:2010.02502 Eq. 12 by hand: diffusers' own stride T // n is off the list for these step counts."""
    plan = _core.make_ddim(SCHEDULE, _core.Steps(steps, spacing=spacing), PREDICTION.EPSILON)
    levels = [*ALPHA_BAR[plan.timesteps.astype(int)], 1.0]
    states = [normal()]
    for t, now, then in zip(plan.timesteps, levels[:-1], levels[1:], strict=True):
        eps = network(states[-1], t)
        x0 = (states[-1] - np.sqrt(1 - now) * eps) / np.sqrt(now)
        states.append(np.sqrt(then) * x0 + np.sqrt(1 - then) * eps)
    assert_close(trace(plan, normal()), states)


@pytest.mark.parametrize("prediction", [PREDICTION.EPSILON, PREDICTION.V_PREDICTION])
def test_inversion(prediction):
    scheduler = in_float64(
        diffusers.DDIMInverseScheduler(
            prediction_type=prediction.name.lower(), clip_sample=False, timestep_spacing="leading"
        )
    )
    scheduler.initial_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(25)
    plan = _core.make_ddim(SCHEDULE, _core.Steps(25, spacing=SPACING.LEADING), prediction, reverse=True)
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    assert_close(trace(plan, normal()), diffusers_trace(scheduler, normal()))


@pytest.mark.parametrize("start", [0, 5])
def test_inversion_is_the_sampling_steps_backwards(start):
    steps = _core.Steps(20, spacing=SPACING.LINSPACE, start=start)

    def constant(x, t):  # the same eps both ways: inversion is exact
        return np.full_like(x, 0.3)

    noisy = trace(_core.make_ddim(SCHEDULE, steps, PREDICTION.EPSILON, reverse=True), normal(), constant)
    clean = trace(_core.make_ddim(SCHEDULE, steps, PREDICTION.EPSILON), noisy[-1], constant)
    assert_close(clean[::-1], noisy)


@pytest.mark.parametrize("clip", [None, (-0.8, 0.8)], ids=["plain", "clip"])
@pytest.mark.parametrize("variance", list(VARIANCE))
@pytest.mark.parametrize("prediction", EVERY_PREDICTION)
def test_ddpm_is_respaced(monkeypatch, prediction, variance, clip):
    scheduler = in_float64(
        diffusers.DDPMScheduler(
            prediction_type=prediction.name.lower(),
            variance_type=variance.name.lower(),
            clip_sample=clip is not None,
            clip_sample_range=0.8,
            timestep_spacing="linspace",
        )
    )
    scheduler.set_timesteps(30)
    calls = iter(range(1, 31))
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda *_, **__: torch.from_numpy(normal(next(calls)))
    )
    steps = _core.Steps(30, spacing=SPACING.LINSPACE)
    plan = _core.make_ddpm(SCHEDULE, steps, prediction, clip=clip, variance=variance)
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    assert_close(trace(plan, normal()), diffusers_trace(scheduler, normal()))


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(
    ("steps", "skip"), [(1, True), (2, True), (3, True), (25, True), (4, False), (25, False)]
)
def test_pndm(steps, skip, to_one):
    scheduler = in_float64(
        diffusers.PNDMScheduler(skip_prk_steps=skip, set_alpha_to_one=to_one, timestep_spacing="leading")
    )
    scheduler.set_timesteps(steps)
    ours = _core.Steps(steps, spacing=SPACING.LEADING, set_alpha_to_one=to_one)
    plan = _core.make_pndm(SCHEDULE, ours, PREDICTION.EPSILON, skip_prk_steps=skip)
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    assert_close(trace(plan, normal()), diffusers_trace(scheduler, normal()))


def dpm_trace(scheduler, x):
    """diffusers' own updates and order rule; its step() would cast the sample to float32."""
    states, outputs, last = [x], [], len(scheduler.timesteps) - 1
    for i, t in enumerate(scheduler.timesteps):
        scheduler._step_index = i
        sample = torch.from_numpy(states[-1])
        output = torch.from_numpy(network(states[-1], float(t)))
        outputs.append(scheduler.convert_model_output(output, sample=sample))
        if i in (0, last):
            sample = scheduler.dpm_solver_first_order_update(outputs[-1], sample=sample)
        else:
            sample = scheduler.multistep_dpm_solver_second_order_update(outputs[-2:], sample=sample)
        states.append(sample.numpy())
    return states


@pytest.mark.parametrize("prediction", EVERY_PREDICTION)
@pytest.mark.parametrize(
    ("steps", "spacing"), [(1, "TRAILING"), (2, "TRAILING"), (20, "TRAILING"), (25, "LINSPACE")]
)
def test_dpm_solver(steps, spacing, prediction):
    plan = _core.make_dpm_solver(SCHEDULE, _core.Steps(steps, spacing=SPACING[spacing]), prediction)
    scheduler = in_float64(
        diffusers.DPMSolverMultistepScheduler(
            prediction_type=prediction.name.lower(), solver_order=2, final_sigmas_type="zero"
        )
    )
    # What set_timesteps(timesteps=...) would do, in float64.
    scheduler.timesteps = torch.from_numpy(plan.timesteps.astype(int))
    levels = ALPHA_BAR[plan.timesteps.astype(int)]
    scheduler.sigmas = torch.tensor([*np.sqrt((1 - levels) / levels), 0.0], dtype=torch.float64)
    assert_close(trace(plan, normal()), dpm_trace(scheduler, normal()))


def test_dpm_solver_of_first_order_is_ddim():
    """The first and the last rows are first order, and so is the whole of a two-step plan."""
    steps = _core.Steps(2, spacing=SPACING.TRAILING)
    ddim = trace(_core.make_ddim(SCHEDULE, steps, PREDICTION.EPSILON), normal())
    assert_close(trace(_core.make_dpm_solver(SCHEDULE, steps, PREDICTION.EPSILON), normal()), ddim)


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("steps", [1, 7, 30, 1000])
def test_rflow(steps, discrete):
    plan = _core.make_rflow(
        steps, use_discrete_timesteps=discrete, use_timestep_transform=True, input_img_size_numel=64**3
    )
    t = (1 - np.arange(steps) / steps) * 1000
    t = np.round(t) if discrete else t
    t = 2 * t / (1 + t / 1000)  # r t / (1 + (r - 1) t), r = (64^3 / 32^3)^(1/3) = 2
    t = np.round(t) if discrete else t
    np.testing.assert_allclose(plan.timesteps, t, rtol=1e-14)
    assert abs(plan.rows["d"].sum() - 1) < 1e-12
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=plan.timesteps / 1000)
    states = [normal()]
    for step, shown in enumerate(scheduler.timesteps):
        output = torch.from_numpy(-network(states[-1], plan.timesteps[step]))  # diffusers predicts noise - x0
        states.append(scheduler.step(output, shown, torch.from_numpy(states[-1])).prev_sample.numpy())
    # diffusers keeps sigma and the sample in float32: eps32 of the largest state at each step.
    atol = 2 * np.finfo(np.float32).eps * (steps + 1) * np.abs(states).max()
    np.testing.assert_allclose(trace(plan, normal()), states, rtol=0, atol=atol)


def test_rflow_offset_moves_what_is_shown():
    plain, moved = _core.make_rflow(10), _core.make_rflow(10, steps_offset=3)
    assert (moved.timesteps == plain.timesteps + 3).all()
    assert (moved.rows["d"] == plain.rows["d"]).all()
