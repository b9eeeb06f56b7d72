"""csrc/loop: the update as csrc/plan.hpp states it, bit for bit; guidance; batches, threads, errors, stopping."""

import gc
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from volcast import _core

SCHEDULE = _core.linear_beta(1000)
EPSILON, V = _core.Prediction.EPSILON, _core.Prediction.V_PREDICTION
PLANS = {
    "ddim": _core.make_ddim(SCHEDULE, _core.Steps(8), EPSILON),
    "ddim_eta_clip": _core.make_ddim(SCHEDULE, _core.Steps(8), V, clip=(-0.5, 0.7), eta=0.5),
    "ddpm": _core.make_ddpm(SCHEDULE, _core.Steps(8), EPSILON),
    "pndm": _core.make_pndm(SCHEDULE, _core.Steps(8), V),
    "pndm_prk": _core.make_pndm(SCHEDULE, _core.Steps(8), EPSILON, skip_prk_steps=False),
    "dpm_solver": _core.make_dpm_solver(SCHEDULE, _core.Steps(8), EPSILON, clip=(-1, 1)),
    "rflow": _core.make_rflow(8),
}
DTYPES = [np.dtype("float32"), np.dtype("float64")]
SEEDS, SAMPLES = np.array([7, 7, 2**63 + 5], np.uint64), np.array([0, 1, 0], np.uint64)


def network(step, x, branch):
    return np.tanh(0.5 * x) + x.dtype.type(0.01 * step)


def start(dtype, shape=(2, 5, 61)):  # 610 values: two whole blocks of the loop and a part
    return _core.normal(SEEDS, SAMPLES, 0, shape, dtype)


def sample(plan, x, net=network, rows=slice(None), **options):
    x = x[rows].copy()
    _core.run(plan, x, net, SEEDS[rows], SAMPLES[rows], **options)
    return x


def by_definition(plan, x, net=network):
    """The comment above `Row` in csrc/plan.hpp, in numpy: double arithmetic, storage in x's dtype."""
    dtype = x.dtype
    history, saved = {}, None
    for step, row in enumerate(plan.rows):
        out, now = net(step, x, None).astype("f8"), x.astype("f8")
        h = np.clip(row["p"] * now + row["q"] * out, row["lo"], row["hi"])
        following = row["a"] * (saved.astype("f8") if row["from_saved"] else now) + row["d"] * out
        following = following + row["e"] * h
        for slot, weight in zip(row["read"], row["b"], strict=True):
            if slot >= 0:
                following = following + weight * history[int(slot)].astype("f8")
        if row["c"] != 0:
            z = _core.normal(SEEDS, SAMPLES, step + 1, x.shape[1:], dtype)
            following = following + row["c"] * z.astype("f8")
        saved = x if row["save"] else saved
        if row["write"] >= 0:
            history[int(row["write"])] = h.astype(dtype)
        x = following.astype(dtype)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_rows_mean_what_they_say(name, dtype):
    np.testing.assert_array_equal(sample(PLANS[name], start(dtype)), by_definition(PLANS[name], start(dtype)))


@pytest.mark.parametrize("guidance", [{}, {"guidance": 2.0}, {"guidance": 2.0, "doubled": True}], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_a_batch_is_its_samples(name, guidance):
    x = start(DTYPES[0])
    together = sample(PLANS[name], x, **guidance)
    for n in range(3):
        alone = sample(PLANS[name], x, rows=slice(n, n + 1), **guidance)
        np.testing.assert_array_equal(together[n : n + 1], alone)


def test_threads_share_a_plan():
    x = start(DTYPES[0])
    results = [None] * 4

    def work(n):
        results[n] = [sample(plan, x) for plan in PLANS.values()]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, *same in zip(PLANS, *results, strict=True):
        for other in same[1:]:
            np.testing.assert_array_equal(other, same[0], err_msg=name)


def test_the_lock_is_free_outside_the_network():
    ticks, running = [0], True

    def tick():
        while running:
            ticks[0] += 1
            time.sleep(1e-4)

    seen = []

    def watching(step, x, branch):
        seen.append(ticks[0])
        out = np.zeros_like(x)
        seen.append(ticks[0])
        return out

    thread = threading.Thread(target=tick)
    thread.start()
    x = np.zeros((1, 1 << 20))  # drawing this noise takes tens of milliseconds
    _core.run(PLANS["ddpm"], x, watching, SEEDS[:1], SAMPLES[:1])
    running = False
    thread.join()
    assert sum(after - before for before, after in zip(seen[1:-1:2], seen[2::2], strict=True)) > 0


def conditional(step, x, branch):
    """Unconditional: tanh(x / 2); conditional: that plus 0.25; one array, used again at every call."""
    buffer = conditional.buffers.setdefault(x.shape, np.empty_like(x))
    np.tanh(0.5 * x, out=buffer)
    if branch is _core.Branch.CONDITIONAL:
        buffer += 0.25
    elif branch is _core.Branch.BOTH:
        buffer[len(x) // 2 :] += 0.25
    conditional.calls.append(branch)
    return buffer


@pytest.fixture(autouse=True)
def _fresh_network():
    conditional.calls, conditional.buffers = [], {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guidance(dtype):
    x, branch = start(dtype), _core.Branch

    def guided(step, x, _):
        u = np.tanh(0.5 * x).astype("f8")
        c = (np.tanh(0.5 * x) + dtype.type(0.25)).astype("f8")
        return (u + 3.0 * (c - u)).astype(dtype)

    wanted = by_definition(PLANS["pndm_prk"], x, guided)
    np.testing.assert_array_equal(sample(PLANS["pndm_prk"], x, conditional, guidance=3.0), wanted)
    assert conditional.calls == [branch.UNCONDITIONAL, branch.CONDITIONAL] * len(PLANS["pndm_prk"])
    conditional.calls.clear()
    np.testing.assert_array_equal(
        sample(PLANS["pndm_prk"], x, conditional, guidance=3.0, doubled=True), wanted
    )
    assert conditional.calls == [branch.BOTH] * len(PLANS["pndm_prk"])
    conditional.calls.clear()
    sample(PLANS["ddim"], x, conditional)
    assert set(conditional.calls) == {branch.CONDITIONAL}


@pytest.mark.parametrize("options", [{}, {"guidance": 1.5, "doubled": True}], ids=str)
def test_what_the_network_sees(options):
    views = []

    def look(step, x, branch):
        views.append(x)
        return np.zeros_like(x)

    x = start(DTYPES[0])
    _core.run(PLANS["ddim"], x, look, SEEDS, SAMPLES, **options)
    assert all(view is views[0] for view in views)
    assert not views[0].flags.writeable and views[0].flags.c_contiguous
    assert views[0].shape == ((6 if options else 3), 2, 5, 61)
    kept = views[0].copy()
    del x, views[1:]
    gc.collect()
    np.testing.assert_array_equal(views[0], kept)  # a view that is kept stays valid


def test_progress_and_timing():
    progress = []

    def slow(step, x, branch):
        time.sleep(0.005)
        return x * 0

    timing = _core.run(
        PLANS["ddim"], start(DTYPES[0]), slow, SEEDS, SAMPLES, on_step=lambda *at: progress.append(at)
    )
    assert progress == [(n, 8) for n in range(1, 9)]
    assert 8 * 0.005 <= timing.network_s <= timing.total_s


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["network", "on_step"])
def test_an_exception_stops_the_loop(where):
    def stop(done):
        if done == 3:
            raise Stop("enough")

    def net(step, x, branch):
        if where == "network":
            stop(step)
        return network(step, x, branch)

    x = start(DTYPES[0])
    on_step = (lambda done, total: stop(done)) if where == "on_step" else None
    with pytest.raises(Stop, match="enough"):
        _core.run(PLANS["ddim"], x, net, SEEDS, SAMPLES, on_step=on_step)
    states = []
    sample(PLANS["ddim"], start(DTYPES[0]), lambda s, x, b: states.append(x.copy()) or network(s, x, b))
    np.testing.assert_array_equal(x, states[3])  # after three whole rows


def test_ctrl_c():
    code = """
import numpy as np
from volcast import _core
plan = _core.make_ddim(_core.linear_beta(100000), _core.Steps(100000), _core.Prediction.EPSILON)
one = np.zeros(1, np.uint64)
def on_step(done, total):
    if done == 1:
        print("running", flush=True)
try:
    _core.run(plan, np.zeros((1, 64)), lambda s, x, b: np.zeros_like(x), one, one, on_step=on_step)
    print("finished")
except KeyboardInterrupt:
    print("stopped")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "stopped\n"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["ddim", "dpm_solver"])
def test_non_finite_output(name, value):
    def net(step, x, branch):
        out = network(step, x, branch)
        if step == 4:
            out[1, 1, 4, 60] = value
        return out

    with pytest.raises(
        ValueError, match=r"\[loop\] step 4 \(t=428\), sample 1: the network's output or x is not fin"
    ):
        sample(PLANS[name], start(DTYPES[0]), net)


def test_overflow_of_x_is_an_error():
    with pytest.raises(ValueError, match=r"\[loop\] step 0 "):
        sample(PLANS["ddim"], start(DTYPES[0]), lambda s, x, b: np.full_like(x, 3e38))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda s, x, b: None, r"\[loop\] step 0: the network gave a NoneType, wanted a numpy array"),
        (lambda s, x, b: x.astype("f8"), r"gave float64 \[3, 2, 5, 61\], wanted float32 \[3, 2, 5, 61\]"),
        (lambda s, x, b: x[:2], r"gave float32 \[2, 2, 5, 61\], wanted"),
        (lambda s, x, b: x[..., None], r"gave float32 \[3, 2, 5, 61, 1\], wanted"),
        (
            lambda s, x, b: np.asfortranarray(x),
            r"step 0: the network's output is not C-contiguous; apply numpy",
        ),
    ],
)
def test_output_guards(net, message):
    with pytest.raises(ValueError, match=message):
        sample(PLANS["ddim"], start(DTYPES[0]), net)


def frozen(x):
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    ("x", "ids", "options", "message"),
    [
        (np.zeros(3, "f4"), (SEEDS, SAMPLES), {}, r"\[run\] x: got float32 \[3\], wanted \[N, ...\]"),
        (np.zeros((0, 4), "f4"), (SEEDS[:0], SAMPLES[:0]), {}, r"x: got float32 \[0, 4\], wanted"),
        (np.zeros((3, 4), "f2"), (SEEDS, SAMPLES), {}, r"x: got float16 \[3, 4\], wanted float32 or float64"),
        (np.zeros((4, 3), "f4").T, (SEEDS, SAMPLES), {}, r"x: need a writeable C-contiguous array"),
        (frozen(np.zeros((3, 4), "f4")), (SEEDS, SAMPLES), {}, r"x: need a writeable"),
        (np.zeros((3, 4), "f4"), (SEEDS[:2], SAMPLES), {}, r"seeds: got uint64 \[2\], wanted uint64 \[3\]"),
        (
            np.zeros((3, 4), "f4"),
            (SEEDS, SAMPLES.astype("i8")),
            {},
            r"samples: got int64 \[3\], wanted uint64",
        ),
        (
            np.zeros((3, 4), "f4"),
            (SEEDS, SAMPLES),
            {"guidance": float("inf")},
            r"guidance=inf: need a finite",
        ),
        (np.zeros((3, 4), "f4"), (SEEDS, SAMPLES), {"doubled": True}, r"doubled=True without guidance"),
    ],
)
def test_input_guards(x, ids, options, message):
    with pytest.raises(ValueError, match=message):
        _core.run(PLANS["ddim"], x, network, *ids, **options)
