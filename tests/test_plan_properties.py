"""csrc/plan*: what must hold of every method, judged by exact solutions for Gaussian data."""

import numpy as np
import pytest

from volcast import _core

F64 = np.dtype("float64")
ONE, ZERO = np.array([1], np.uint64), np.array([0], np.uint64)
SCHEDULE = _core.scaled_linear_beta(1000, 0.0015, 0.0195)
ALPHA_BAR = SCHEDULE.alphas_cumprod
SPACING, PREDICTION, VARIANCE = _core.Spacing, _core.Prediction, _core.Variance
MEAN, STD = 0.3, 0.25


def output(x, alpha_bar, prediction=PREDICTION.EPSILON):
    """The exact network for data N(MEAN, STD^2): E[x0 | x_t], E[eps | x_t] or E[v | x_t]."""
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    x0 = MEAN + np.sqrt(alpha_bar) * STD**2 / variance * (x - np.sqrt(alpha_bar) * MEAN)
    eps = (x - np.sqrt(alpha_bar) * x0) / np.sqrt(1 - alpha_bar)
    v = np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * x0
    return {PREDICTION.EPSILON: eps, PREDICTION.SAMPLE: x0, PREDICTION.V_PREDICTION: v}[prediction]


def states(plan, x, prediction=PREDICTION.EPSILON):
    """x before every row and the result, [rows + 1, *x.shape]."""
    x, seen = np.array(x, dtype=F64)[None].copy(), []

    def network(step, x, branch):
        seen.append(x[0].copy())
        return output(x, ALPHA_BAR[int(plan.timesteps[step])], prediction)

    _core.run(plan, x, network, ONE, ZERO)
    return np.array([*seen, x[0]])


def final_mean_and_std(plan):
    """Every deterministic method is affine here: from N(0, 1) it reaches N(f(0), (f(1) - f(0))^2)."""
    at_0, at_1 = states(plan, [0.0, 1.0])[-1]
    return at_0, at_1 - at_0


METHODS = {
    "ddim": lambda steps, prediction: _core.make_ddim(SCHEDULE, steps, prediction),
    "ddim_eta_clip": lambda steps, prediction: _core.make_ddim(
        SCHEDULE, steps, prediction, clip=(0, 0.6), eta=0.5
    ),
    "ddpm": lambda steps, prediction: _core.make_ddpm(SCHEDULE, steps, prediction),
    "ddpm_large": lambda steps, prediction: _core.make_ddpm(
        SCHEDULE, steps, prediction, variance=VARIANCE.FIXED_LARGE
    ),
    "pndm": lambda steps, prediction: _core.make_pndm(SCHEDULE, steps, prediction),
    "pndm_prk": lambda steps, prediction: _core.make_pndm(SCHEDULE, steps, prediction, skip_prk_steps=False),
    "dpm_solver": lambda steps, prediction: _core.make_dpm_solver(SCHEDULE, steps, prediction),
    "dpm_solver_clip": lambda steps, prediction: _core.make_dpm_solver(
        SCHEDULE, steps, prediction, clip=(0, 0.6)
    ),
}


# pndm refuses sample: test_guards.
OTHERS = [
    (m, p) for m in METHODS for p in list(PREDICTION)[1:] if not (m[:4] == "pndm" and p == PREDICTION.SAMPLE)
]


@pytest.mark.parametrize(("method", "prediction"), OTHERS)
def test_predictions_are_equivalent(method, prediction):
    x = _core.normal(ONE, ZERO, 0, [64], F64)[0]
    steps = _core.Steps(25, spacing=SPACING.LINSPACE)
    by_eps = states(METHODS[method](steps, PREDICTION.EPSILON), x)
    other = states(METHODS[method](steps, prediction), x, prediction)
    # x0 -> eps divides by sqrt(1 - alpha_bar[0]) = 0.04 and eps -> x0 by sqrt(alpha_bar[T-1]) = 0.027, each row.
    tolerance = 25 * 16 * np.finfo(F64).eps / 0.027 / 0.038
    np.testing.assert_allclose(other, by_eps, rtol=0, atol=tolerance * np.abs(by_eps).max())


# Section 2 of the reference on MONAI, spacing leading as in diffusers: (std of DDIM, of PNDM with set_alpha_to_one off)
@pytest.mark.parametrize(
    ("steps", "ddim", "pndm"),
    [(1000, 0.244, 0.252), (250, 0.237, 0.250), (50, 0.211, 0.238), (20, 0.178, 0.214), (10, 0.145, 0.182)],
)
def test_gaussian_oracle(steps, ddim, pndm):
    leading = _core.Steps(steps, spacing=SPACING.LEADING)
    mean, std = final_mean_and_std(METHODS["ddim"](leading, PREDICTION.EPSILON))
    assert abs(mean - MEAN) < 0.005 and abs(std - ddim) < 0.003
    open_end = _core.Steps(steps, spacing=SPACING.LEADING, set_alpha_to_one=False)
    mean, std = final_mean_and_std(METHODS["pndm"](open_end, PREDICTION.EPSILON))
    assert abs(mean - MEAN) < 0.01 and abs(std - pndm) < 0.003


@pytest.mark.parametrize("method", ["ddpm", "ddpm_large"])
def test_ddpm_reaches_the_data(method):
    count = 4096
    x = _core.normal(ONE, ZERO, 0, [count], F64)[0]
    plan = METHODS[method](_core.Steps(1000, spacing=SPACING.LINSPACE), PREDICTION.EPSILON)
    last = states(plan, x)[-1]
    # 4 standard errors, plus the ancestral sampler's own error, at most 3 % of STD at 1000 steps.
    assert abs(last.mean() - MEAN) < 4 * STD / np.sqrt(count)
    assert abs(last.std() - STD) < 4 * STD / np.sqrt(2 * count) + 0.03 * STD


def test_order_of_convergence():
    """Against the exact flow from the first timestep to t = 500; slope of log error over log step size."""
    errors = {"ddim": [], "pndm": [], "pndm_prk": [], "dpm_solver": []}
    counts = [20, 50, 100, 200]
    for name, series in errors.items():
        for count in counts:
            plan = METHODS[name](_core.Steps(count, spacing=SPACING.LEADING), PREDICTION.EPSILON)
            row = plan.timesteps.tolist().index(500)
            top, bottom = ALPHA_BAR[int(plan.timesteps[0])], ALPHA_BAR[500]
            spread = [np.sqrt(level * STD**2 + 1 - level) for level in (top, bottom)]
            exact = np.sqrt(bottom) * MEAN + spread[1] / spread[0] * (1.0 - np.sqrt(top) * MEAN)
            series.append(abs(states(plan, [1.0])[row, 0] - exact))
    slopes = {name: np.polyfit(-np.log(counts), np.log(series), 1)[0] for name, series in errors.items()}
    assert 0.8 < slopes["ddim"] < 1.2, slopes
    for name in ("pndm", "pndm_prk", "dpm_solver"):
        assert slopes[name] > 1.5, slopes  # second order, measured between 1.6 and 2
        assert (np.array(errors[name]) < errors["ddim"]).all()


@pytest.mark.parametrize("method", ["ddim", "ddim_eta_clip", "ddpm"])
def test_start_drops_rows(method):
    whole = METHODS[method](_core.Steps(10), PREDICTION.EPSILON)
    late = METHODS[method](_core.Steps(10, start=4), PREDICTION.EPSILON)
    assert (late.rows == whole.rows[4:]).all()


@pytest.mark.parametrize(("method", "calls"), [("pndm", 7), ("pndm_prk", 15), ("dpm_solver", 6)])
def test_multistep_starts_afresh(method, calls):
    late = METHODS[method](_core.Steps(10, spacing=SPACING.LEADING, start=4), PREDICTION.EPSILON)
    assert len(late) == calls and late.timesteps[0] == 500
    written = set()
    for row in late.rows:
        assert set(row["read"][row["read"] >= 0]) <= written  # nothing is read before it was written
        written.add(int(row["write"]))
    assert written - {-1} == set(range(late.history_slots))
    rflow = _core.make_rflow(10, start=4)
    assert (rflow.rows == _core.make_rflow(10).rows[4:]).all()


def test_rows_are_a_read_only_view_that_outlives_the_plan():
    rows = METHODS["pndm_prk"](_core.Steps(10), PREDICTION.EPSILON).rows
    assert rows.dtype.names[:3] == ("t", "signal", "sigma") and rows["b"].shape == (19, 3)
    with pytest.raises(ValueError, match="read-only"):
        rows["a"] = 0
    np.testing.assert_allclose(rows["signal"] ** 2 + rows["sigma"] ** 2, 1, rtol=1e-14)
    np.testing.assert_allclose(rows["signal"] ** 2, ALPHA_BAR[rows["t"].astype(int)], rtol=1e-14)


def test_repr_prints_rows():
    text = repr(METHODS["pndm"](_core.Steps(3, spacing=SPACING.LEADING), PREDICTION.EPSILON))
    assert text.startswith("Plan(pndm, 4 rows)\n  0: t=666: x <- ") and "history[0] = h; saved = x" in text
    text = repr(METHODS["ddim_eta_clip"](_core.Steps(3), PREDICTION.EPSILON))
    assert "*normal" in text and "in [0, 0.6]" in text


def test_facts_of_plans():
    facts = {
        name: (plan.method, plan.history_slots, plan.keeps_saved, plan.stochastic)
        for name, make in METHODS.items()
        for plan in [make(_core.Steps(10), PREDICTION.EPSILON)]
    }
    assert facts["ddim"] == ("ddim", 0, False, False)
    assert facts["ddpm"] == ("ddpm", 0, False, True)
    assert facts["pndm"] == ("pndm", 3, True, False)
    assert facts["pndm_prk"] == ("pndm", 5, True, False)
    assert facts["dpm_solver"] == ("dpm-solver++", 1, False, False)


def ddim(
    steps=10, prediction=PREDICTION.EPSILON, schedule=SCHEDULE, clip=None, eta=0.0, reverse=False, **asked
):
    return _core.make_ddim(
        schedule, _core.Steps(steps, **asked), prediction, clip=clip, eta=eta, reverse=reverse
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ddim(0), r"\[timesteps\] steps=0: need 1..1000"),
        (lambda: ddim(1001), r"steps=1001: need 1..1000"),
        (lambda: ddim(start=10), r"\[ddim\] start=10: need 0..9 with steps=10"),
        (lambda: ddim(start=-1), r"start=-1"),
        (lambda: ddim(eta=1.5), r"\[ddim\] eta=1.5: need 0..1"),
        (lambda: ddim(eta=float("nan")), r"eta=nan"),
        (lambda: ddim(eta=0.5, reverse=True), r"eta=0.5 with reverse"),
        (lambda: ddim(clip=(1, -1)), r"\[ddim\] clip: need low < high"),
        (lambda: ddim(clip=(float("nan"), 1)), r"clip: need low < high"),
        (lambda: ddim(prediction=PREDICTION.SAMPLE, reverse=True), r"need set_alpha_to_one=False"),
        (lambda: ddim(schedule=_core.linear_beta(1000, 0.9, 0.99)), r"timestep 999 are not finite"),
        (lambda: _core.make_ddpm(SCHEDULE, _core.Steps(5, start=5), PREDICTION.SAMPLE), r"\[ddpm\] start=5"),
        (lambda: _core.make_ddpm(SCHEDULE, _core.Steps(5), PREDICTION.SAMPLE, clip=(0, 0)), r"\[ddpm\] clip"),
        (
            lambda: _core.make_pndm(SCHEDULE, _core.Steps(5), PREDICTION.SAMPLE),
            r"\[pndm\] prediction sample: need eps",
        ),
        (
            lambda: _core.make_pndm(
                SCHEDULE, _core.Steps(5, start=2), PREDICTION.EPSILON, skip_prk_steps=False
            ),
            r"steps=5 with start=2: the three Runge-Kutta steps need 4 or more",
        ),
        (
            lambda: _core.make_dpm_solver(SCHEDULE, _core.Steps(5, start=5), PREDICTION.EPSILON),
            r"\[dpm-solver",
        ),
        (lambda: _core.make_rflow(0), r"\[rflow\] steps=0: need 1..1000"),
        (lambda: _core.make_rflow(1001), r"steps=1001"),
        (lambda: _core.make_rflow(10, start=10), r"\[rflow\] start=10"),
        (lambda: _core.make_rflow(1, train_timesteps=0), r"train_timesteps=0"),
        (lambda: _core.make_rflow(10, steps_offset=-1), r"steps_offset=-1"),
        (lambda: _core.make_rflow(10, input_img_size_numel=0), r"input_img_size_numel=0"),
        (lambda: _core.make_rflow(10, base_img_size_numel=0), r"base_img_size_numel=0"),
        (lambda: _core.make_rflow(10, spatial_dim=4), r"spatial_dim=4: need 1..3"),
    ],
)
def test_guards(call, message):
    with pytest.raises(ValueError, match=message):
        call()
