"""csrc/schedule: MONAI's betas, closed forms in float64, and timesteps equal to diffusers' and MONAI's."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler as DiffusersDDIM
from monai.networks.schedulers import DDIMScheduler as MonaiDDIM
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM

from volcast import _core

EPS32 = float(np.finfo(np.float32).eps)
SCHEDULES = [
    ("linear_beta", {"beta_start": 1e-4, "beta_end": 2e-2}),
    ("scaled_linear_beta", {"beta_start": 0.0015, "beta_end": 0.0195}),
    ("sigmoid_beta", {"beta_start": 1e-4, "beta_end": 2e-2, "sig_range": 6.0}),
    ("cosine", {"s": 8e-3}),
]


@pytest.mark.parametrize("train", [1, 2, 17, 1000])
@pytest.mark.parametrize(("name", "arguments"), SCHEDULES)
def test_matches_monai(name, arguments, train):
    ours = getattr(_core, name)(train, **arguments)
    monai = MonaiDDPM(train, schedule=name, **arguments)
    # MONAI works in float32: linear ramps are off by a few eps32 of beta_end; cosine's 1 - cos^2 / cos^2 by
    # a few eps32 of 1, and an error eps32 of an angle becomes tan(angle) eps32 of its cosine.
    atol = np.full(train, 8 * EPS32 * arguments.get("beta_end", 1.0))
    if name == "cosine":
        angle = (np.arange(1, train + 1) / train + 8e-3) / 1.008 * np.pi / 2
        atol[:-1] *= 1 + np.tan(angle[:-1])
    assert (np.abs(ours.betas - monai.betas.double().numpy()) <= atol).all()
    # log(alpha_bar) adds up the errors of its terms log(1 - beta), and MONAI's float32 1 - beta.
    error = np.cumsum((atol + 8 * EPS32) / (1 - ours.betas))
    difference = np.abs(np.log(ours.alphas_cumprod) - np.log(monai.alphas_cumprod.double().numpy()))
    assert (difference <= error).all()


def test_closed_forms():
    train, start, end = 1000, 0.0015, 0.0195
    forms = {
        "linear_beta": np.linspace(start, end, train),
        "scaled_linear_beta": np.linspace(start**0.5, end**0.5, train) ** 2,
        "sigmoid_beta": start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, train))),
    }
    for name, betas in forms.items():
        schedule = getattr(_core, name)(train, start, end)
        assert len(schedule) == train
        np.testing.assert_allclose(schedule.betas, betas, rtol=1e-13)
        np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-12)
    # Before the clip of beta at 0.999 the cosine alpha_bar telescopes to its closed form.
    wave = np.cos((np.arange(1, train) / train + 8e-3) / 1.008 * np.pi / 2) ** 2
    wave /= np.cos(8e-3 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(_core.cosine(train).alphas_cumprod[:-1], wave, rtol=1e-10)


@pytest.mark.parametrize("train", [1000, 37])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_spacing_matches_diffusers(spacing, train):
    scheduler = DiffusersDDIM(num_train_timesteps=train, timestep_spacing=spacing)
    for steps in range(1, train + 1):
        scheduler.set_timesteps(steps)
        wanted = scheduler.timesteps.tolist()
        if spacing == "linspace" and steps == 1:
            wanted = [train - 1]  # numpy's one-point linspace gives 0, which would leave the noise as it is
        # numpy's arange gives one timestep too many, -1, for a few step counts.
        assert _core.spaced_timesteps(_core.Spacing[spacing.upper()], train, steps) == wanted[:steps]


def test_table_2_of_2305_08891():
    spaced = {
        name: _core.spaced_timesteps(_core.Spacing[name], 1000, 10)
        for name in ("LEADING", "LINSPACE", "TRAILING")
    }
    assert spaced["LEADING"] == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert spaced["LINSPACE"] == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert spaced["TRAILING"] == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


@pytest.mark.parametrize(("train", "offset"), [(1000, 0), (1000, 1), (37, 5)])
def test_monai_linspace(train, offset):
    scheduler = MonaiDDIM(train, steps_offset=offset)
    for steps in range(1, train + 1):
        scheduler.set_timesteps(steps)
        assert _core.monai_linspace(train, steps, offset) == scheduler.timesteps.tolist(), steps


def test_offset_moves_leading_only():
    plain = _core.spaced_timesteps(_core.Spacing.LEADING, 1000, 50)
    assert _core.spaced_timesteps(_core.Spacing.LEADING, 1000, 50, 1) == [t + 1 for t in plain]
    for spacing in (_core.Spacing.LINSPACE, _core.Spacing.TRAILING):
        assert _core.spaced_timesteps(spacing, 1000, 50, 1) == _core.spaced_timesteps(spacing, 1000, 50)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _core.linear_beta(0), r"\[schedule\] timesteps=0: need at least 1"),
        (lambda: _core.cosine(-3), r"timesteps=-3"),
        (lambda: _core.linear_beta(10, 0.0, 0.1), r"beta_start=0: need a number inside \(0, 1\)"),
        (lambda: _core.scaled_linear_beta(10, 0.1, 1.0), r"beta_end=1: "),
        (lambda: _core.linear_beta(10, float("nan")), r"beta_start=nan"),
        (lambda: _core.sigmoid_beta(10, sig_range=-1), r"sig_range=-1: need a positive number"),
        (lambda: _core.cosine(10, 2.0), r"s=2: need 0..1"),
        (lambda: _core.spaced_timesteps(_core.Spacing.LEADING, 10, 0), r"\[timesteps\] steps=0: need 1..10"),
        (lambda: _core.spaced_timesteps(_core.Spacing.LEADING, 10, 11), r"steps=11: need 1..10"),
        (lambda: _core.spaced_timesteps(_core.Spacing.LEADING, 10, 10, 1), r"steps_offset=1 with steps=10"),
        (lambda: _core.spaced_timesteps(_core.Spacing.LEADING, 10, 5, -1), r"steps_offset=-1"),
        (lambda: _core.monai_linspace(10, 5, 10), r"steps_offset=10: need 0..9"),
    ],
)
def test_guards(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tables_are_copies():
    schedule = _core.linear_beta(10)
    schedule.betas[:] = 0
    assert schedule.betas[0] == 1e-4
    assert torch.from_numpy(schedule.alphas_cumprod).dtype == torch.float64
