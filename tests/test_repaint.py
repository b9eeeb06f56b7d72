"""csrc/plan_repaint: RePaint against the authors' schedule, diffusers' scheduler and the paper's loop in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_repaint

from volcast import _core

F64 = np.dtype("float64")
SEEDS, SAMPLES = np.array([11, 11, 5], np.uint64), np.array([3, 0, 2**40], np.uint64)
SHAPE = (2, 5, 61)  # 610 values: two whole blocks of the loop and a part
TRAIN = 20
SCHEDULE = _core.linear_beta(TRAIN, 0.01, 0.3)
EPSILON = _core.Prediction.EPSILON
rng = np.random.default_rng(0)
KNOWN = rng.standard_normal(SHAPE)
KEEP = (rng.random(SHAPE) < 0.6).astype(F64)
CLOSE = 1e-12
"""Relative: tens of rows of some ten operations each, off by eps64 = 2e-16, in maps that do not stretch."""


def authors_schedule(steps: int, resamples: int, jump: int) -> list[int]:
    """`get_schedule_jump` of the paper's appendix B.2, with the clean end (-1)."""
    jumps = {j: resamples - 1 for j in range(0, steps - jump, jump)}
    t, times = steps, []
    while t >= 1:
        t = t - 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] = jumps[t] - 1
            for _ in range(jump):
                t = t + 1
                times.append(t)
    return [*times, -1]


def network(x, t):
    return np.tanh(0.7 * x) + 0.1 * np.cos(t)


def noise(step, which=0):
    return _core.normal(SEEDS, SAMPLES, step | which, SHAPE, F64)


def paint(plan, **given):
    x = noise(0)
    known = {"known": KNOWN, "keep": KEEP} | given
    _core.run(
        plan, x, lambda step, now, _: network(now, plan.timesteps[step]), SEEDS, SAMPLES,
        **{key: value for key, value in known.items() if value is not None},
    )  # fmt: skip
    return x


@pytest.mark.parametrize(("resamples", "jump"), [(1, 1), (4, 1), (3, 2), (2, 3), (5, 7), (2, 19)])
def test_the_schedule_is_the_authors(resamples, jump):
    plan = _core.make_repaint(
        _core.make_ddpm(SCHEDULE, _core.Steps(TRAIN), EPSILON), resamples=resamples, jump_length=jump
    )
    times = authors_schedule(TRAIN, resamples, jump)
    shown = [now for now, following in pairwise(times) if following < now]
    assert plan.timesteps.tolist() == shown
    assert plan.inpaints and len(plan) >= TRAIN


def test_ddim_against_diffusers(monkeypatch):
    """Jumps of one step, where diffusers' step back has one noise as ours; eta 0, for it uses one noise for both parts."""
    drawn = []
    monkeypatch.setattr(scheduling_repaint, "randn_tensor", lambda *_, **__: torch.from_numpy(drawn.pop(0)))
    scheduler = scheduling_repaint.RePaintScheduler(TRAIN, trained_betas=SCHEDULE.betas, clip_sample=True)
    scheduler.set_timesteps(TRAIN)
    plan = _core.make_ddim(SCHEDULE, _core.Steps(TRAIN), EPSILON, clip=(-1, 1))
    plan = _core.make_repaint(plan, resamples=3, jump_length=1)
    times, row, x = authors_schedule(TRAIN, 3, 1), 0, torch.from_numpy(noise(0))
    known, keep = torch.from_numpy(KNOWN), torch.from_numpy(KEEP)
    for now, following in pairwise(times):
        if following < now:
            row += 1
            drawn.append(noise(row, _core.KNOWN_NOISE))
            out = torch.from_numpy(network(x.numpy(), now))
            x = scheduler.step(out, now, x, known, keep).prev_sample
        else:
            drawn.append(noise(row, _core.AGAIN_NOISE))
            x = scheduler.undo_step(x, following)
    assert row == len(plan) and not drawn
    np.testing.assert_allclose(paint(plan), x.numpy(), rtol=0, atol=CLOSE * np.abs(KNOWN).max())


@pytest.mark.parametrize(("steps", "resamples", "jump"), [(TRAIN, 2, 3), (7, 3, 2), (5, 1, 1)])
def test_ddpm_against_the_papers_loop(steps, resamples, jump):
    """Algorithm 1 with equations 8a to 8c, respaced; a jump over several steps is one draw of q(x_s | x_t)."""
    grid = [round(t) for t in np.linspace(TRAIN - 1, 0, steps)][::-1]  # by the authors' index, 0 cleanest
    bar = SCHEDULE.alphas_cumprod[grid]
    x, row = noise(0), 0
    times = authors_schedule(steps, resamples, jump)
    place = 0
    while place < len(times) - 1:
        now, following = times[place], times[place + 1]
        if following < now:
            row += 1
            a, before = bar[now], bar[now - 1] if now else 1.0
            beta = 1 - a / before
            eps = network(x, grid[now])
            mean = (x - beta / np.sqrt(1 - a) * eps) / np.sqrt(1 - beta)  # DDPM, arXiv:2006.11239 Eq. 11
            unknown = mean + (np.sqrt((1 - before) / (1 - a) * beta) * noise(row) if now else 0)
            known = np.sqrt(before) * KNOWN + np.sqrt(1 - before) * noise(row, _core.KNOWN_NOISE)
            x, place = KEEP * known + (1 - KEEP) * unknown, place + 1
        else:
            back = now + jump
            kept = bar[back] / bar[now]
            x = np.sqrt(kept) * x + np.sqrt(1 - kept) * noise(row, _core.AGAIN_NOISE)
            place += jump
    plan = _core.make_repaint(
        _core.make_ddpm(SCHEDULE, _core.Steps(steps), EPSILON), resamples=resamples, jump_length=jump
    )
    assert row == len(plan)
    painted = paint(plan)
    np.testing.assert_allclose(painted, x, rtol=0, atol=CLOSE * np.abs(x).max())
    np.testing.assert_array_equal(painted[:, KEEP == 1], np.broadcast_to(KNOWN, x.shape)[:, KEEP == 1])


def test_rectified_flow_keeps_its_levels():
    """x_t = (1 - t) x0 + t noise at every row, also after a jump: for data that is one point the flow ends at it."""
    plan = _core.make_repaint(_core.make_rflow(6), resamples=3, jump_length=2)
    point = 0.7
    x, seen = noise(0), []

    def flow(step, now, _):
        t = plan.timesteps[step] / 1000
        seen.append(((now - (1 - t) * point) / t).std())
        return (point - now) / t  # x0 - noise

    _core.run(plan, x, flow, SEEDS, SAMPLES, known=np.full(SHAPE, point), keep=KEEP)
    np.testing.assert_allclose(x, point, rtol=0, atol=1e-9)
    # The noise that is left has standard deviation 1 at every row: 1830 values, six standard errors.
    assert np.abs(np.array(seen) - 1).max() < 6 / np.sqrt(2 * x.size)


def closed_form(method: str, steps: int, resamples: int, jump: int) -> tuple[float, float]:
    """Mean and std of the second of 20000 pairs of standard normals of correlation 0.8, the first of each known to be 1.

    Exactly they are 0.8 and 0.6. The network is the exact denoiser: x0 given x has mean sqrt(a) C (a C + (1 - a) 1)^-1 x.
    """
    make = {"ddim": _core.make_ddim, "ddpm": _core.make_ddpm}[method]
    plan = make(_core.linear_beta(1000), _core.Steps(steps), EPSILON)
    plan = _core.make_repaint(plan, resamples=resamples, jump_length=jump)
    covariance, one = np.array([[1, 0.8], [0.8, 1]]), np.zeros(1, np.uint64)
    x = _core.normal(one, one, 0, (2, 20000), F64)

    def exact(step, now, _):
        a = plan.rows["signal"][step] ** 2
        gain = np.sqrt(a) * covariance @ np.linalg.inv(a * covariance + (1 - a) * np.eye(2))
        return (now - np.sqrt(a) * (gain @ now)) / np.sqrt(1 - a)

    keep = np.zeros(x.shape[1:])
    keep[0] = 1
    _core.run(plan, x, exact, one, one, known=np.ones(keep.shape), keep=keep)
    np.testing.assert_array_equal(x[0, 0], 1)
    return float(x[0, 1].mean()), float(x[0, 1].std())


def test_resampling_brings_the_conditional_distribution():
    # The marginal mean is 0; what is drawn tells the mean to 0.6 / sqrt(20000) = 0.004.
    once, four, ten = (0.8 - closed_form("ddpm", 40, resamples, 1)[0] for resamples in (1, 4, 10))
    assert once < 0.8 and four < once / 2 and ten < four / 2 + 0.02


def test_the_figures_of_the_docs():
    np.testing.assert_allclose(closed_form("ddim", 50, 1, 1), (0.348, 0.748), rtol=0, atol=0.0011)
    np.testing.assert_allclose(closed_form("ddpm", 50, 4, 10), (0.649, 0.600), rtol=0, atol=0.0011)


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (_core.make_pndm(SCHEDULE, _core.Steps(8), EPSILON), {}, r"\[repaint\] pndm remembers earlier steps.*need ddim"),
        (_core.make_dpm_solver(SCHEDULE, _core.Steps(8), EPSILON), {}, r"\[repaint\] dpm-solver.* remembers earlier"),
        (_core.make_ddim(SCHEDULE, _core.Steps(8), EPSILON, reverse=True), {}, r"an inversion cannot inpaint"),
        (_core.make_ddim(SCHEDULE, _core.Steps(8), EPSILON), {"resamples": 0}, r"resamples=0: need 1..1000"),
        (_core.make_ddim(SCHEDULE, _core.Steps(8), EPSILON), {"jump_length": 8}, r"jump_length=8: need 1..7"),
        (_core.make_ddim(SCHEDULE, _core.Steps(8), EPSILON), {"jump_length": 0}, r"jump_length=0: need 1..7"),
    ],
)  # fmt: skip
def test_refusals(plan, options, message):
    with pytest.raises(ValueError, match=message):
        _core.make_repaint(plan, **{"resamples": 2, "jump_length": 1} | options)


def test_what_is_known_belongs_to_the_plan():
    plain = _core.make_ddim(SCHEDULE, _core.Steps(4), EPSILON)
    plan = _core.make_repaint(plain, resamples=2, jump_length=1)
    assert not plain.inpaints and "*known" in repr(plan) and "*normal''" in repr(plan)
    with pytest.raises(ValueError, match=r"\[loop\] ddim: the plan inpaints; give known and keep"):
        paint(plan, known=None, keep=None)
    with pytest.raises(ValueError, match=r"\[loop\] ddim: known and keep are for a plan of make_repaint"):
        paint(plain)
    with pytest.raises(ValueError, match=r"\[run\] known, keep: got float64 \[2, 5\], wanted"):
        paint(plan, keep=np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"already|remembers"):
        _core.make_repaint(plan, resamples=2, jump_length=1)
