"""kernels/sampler_step: whole runs with the bits of csrc's loop, by `_core`; the counter; guards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from volcast import _core
from volcast.kernels import philox, sampler_step_triton
from volcast.kernels.sampler_step import plan_table, sampler_step, step_counter

SCHEDULE = _core.linear_beta(1000)
EPSILON, V = _core.Prediction.EPSILON, _core.Prediction.V_PREDICTION
STEPS = _core.Steps(4)
PLANS = {
    "ddim": _core.make_ddim(SCHEDULE, STEPS, EPSILON),
    "ddim_clip": _core.make_ddim(SCHEDULE, STEPS, V, clip=(-0.5, 0.7)),  # h without history
    "ddim_eta": _core.make_ddim(SCHEDULE, STEPS, V, clip=(-0.5, 0.7), eta=0.5),  # clip and noise
    "ddim_reverse": _core.make_ddim(SCHEDULE, STEPS, EPSILON, reverse=True),
    "ddpm": _core.make_ddpm(SCHEDULE, STEPS, EPSILON),  # noise in all rows but the last
    "pndm": _core.make_pndm(SCHEDULE, STEPS, V),  # history, saved
    # Runge-Kutta: a row may read and write one slot, and start from `saved`.
    "pndm_prk": _core.make_pndm(SCHEDULE, STEPS, EPSILON, skip_prk_steps=False),
    "dpm_solver": _core.make_dpm_solver(SCHEDULE, STEPS, EPSILON, clip=(-1, 1)),  # h of x and out, kept
    "rflow": _core.make_rflow(4),
}
SEEDS, SAMPLES = np.array([7, 2**63 + 5], np.uint64), np.array([2**40 + 1, 3], np.uint64)
SHAPES = [
    (2, 3, 5, 4, 3),  # 60 voxels: no Philox block straddles two channels
    (2, 5, 3, 3, 3),  # 27 voxels: blocks straddle channels at every offset
    (2, 4, 31, 1),  # an image; 8 blocks hold 31 values, but 9 a channel's that begins within one
    (2, 1, 3, 3, 3),  # one channel: both layouts are one
    (2, 5, 1, 1),  # one voxel: a block holds four channels
]
LAYOUTS = ["contiguous", "channels_last"]
ADD = np.float32(0.25)
MAX32 = 0xFFFFFFFF


def identity(values: np.ndarray, device: Any = "cpu") -> Tensor:
    return torch.from_numpy(values.view(np.int64).copy()).to(device)


def laid_out(values: Tensor, layout: str, first: int = 1) -> Tensor:
    """A copy in the layout; `first` is the axis of the channels."""
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    return values.movedim(first, -1).clone(memory_format=torch.contiguous_format).movedim(-1, first)


def bits(x: Tensor | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.cpu().numpy() if isinstance(x, Tensor) else x).view(np.int32)


def noise(shape: tuple[int, ...], step: int = 0) -> np.ndarray:
    n = shape[0]
    return _core.normal(SEEDS[:n], SAMPLES[:n], step, shape[1:], np.dtype("f4"))


def network(step: int, x: np.ndarray, dtype: torch.dtype, conditional: bool = True) -> np.ndarray:
    """Float32 values that `dtype` holds exactly."""
    out = np.tanh(np.float32(0.5) * x) + np.float32(0.01 * step) + (ADD if conditional else 0)
    return torch.from_numpy(out).to(dtype).float().numpy()


def by_core(plan: Any, x: np.ndarray, dtype: torch.dtype, guidance: float | None) -> np.ndarray:
    def net(step: int, x: np.ndarray, branch: Any) -> np.ndarray:
        return network(step, x, dtype, branch is not _core.Branch.UNCONDITIONAL)

    x, n = x.copy(), len(x)
    _core.run(plan, x, net, SEEDS[:n], SAMPLES[:n], guidance=guidance)
    return x


class Run:
    """A plan on the device: every tensor that `sampler_step` needs, buffers full of NaN at the start."""

    def __init__(
        self, plan: Any, x: np.ndarray, layout: str, device: Any, *, dtype: torch.dtype = torch.float32,
        guidance: float | None = None, doubled: bool = False,
    ) -> None:  # fmt: skip
        self.plan, self.layout, self.dtype, self.doubled = plan, layout, dtype, doubled
        self.table = plan_table(plan.rows, device)
        n, nan = len(x), torch.full(x.shape, torch.nan)
        self.x = self.tensor(torch.from_numpy(x).to(device))
        shape = (plan.history_slots, *x.shape)
        self.kept: dict[str, Any] = {
            "history": laid_out(nan.expand(shape).to(device), layout, 2) if plan.history_slots else None,
            "saved": self.tensor(nan.to(device)) if plan.keeps_saved else None,
            "guidance": None
            if guidance is None
            else torch.full((n,), guidance, dtype=torch.float64, device=device),
            "network_input": self.tensor(torch.cat([nan] * (2 if doubled else 1)).to(device, dtype)),
            "seeds": identity(SEEDS[:n], device),
            "samples": identity(SAMPLES[:n], device),
        }
        self.counter = step_counter(n, device)

    def tensor(self, values: Tensor) -> Tensor:
        return laid_out(values, self.layout)

    def outputs(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The network's output, and without the condition; views of one tensor if by one call."""
        x = self.x.cpu().contiguous().numpy()

        def out(conditional: bool) -> Tensor:
            values = torch.from_numpy(network(step, x, self.dtype, conditional))
            return self.tensor(values.to(self.x.device, self.dtype))

        if self.kept["guidance"] is None:
            return out(True), None
        if self.doubled:
            uncond, cond = self.tensor(torch.cat([out(False), out(True)])).chunk(2)
            return cond, uncond
        return out(True), out(False)

    def step(self, out: Tensor, uncond: Tensor | None = None, impl: str | None = "triton") -> None:
        sampler_step(self.x, out, self.table, self.counter, uncond=uncond, **self.kept, impl=impl)

    def all(self, impl: str | None = "triton") -> Tensor:
        for step in range(len(self.plan)):
            assert self.counter[:2].tolist() == [step, 0]
            self.step(*self.outputs(step), impl=impl)
        return self.x


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors: several programs, the last not full."""
    settings = {"blocks": 32, "warps": 1}
    monkeypatch.setattr(sampler_step_triton, "configuration", lambda kernel, dtype, size: settings)


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PLANS)
def test_a_run_has_the_bits_of_csrc(name: str, layout: str, impl: str, device: Any) -> None:
    """Noise apart, by construction; with it, one value in 7e9 may differ: see `standard_normal`."""
    x = noise(SHAPES[1])
    run = Run(PLANS[name], x, layout, device)
    np.testing.assert_array_equal(bits(run.all(impl)), bits(by_core(PLANS[name], x, torch.float32, None)))
    assert run.counter.tolist() == [len(PLANS[name]), 0, -1, -1]
    assert torch.equal(run.kept["network_input"], run.x) and run.x.stride() == run.tensor(run.x).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_value_gets_its_own_noise(shape: tuple[int, ...], layout: str, device: Any) -> None:
    x = noise(shape)
    run = Run(PLANS["ddpm"], x, layout, device)
    np.testing.assert_array_equal(bits(run.all()), bits(by_core(PLANS["ddpm"], x, torch.float32, None)))


@pytest.mark.parametrize(
    ("name", "doubled", "dtype", "layout"),
    [
        (
            "pndm_prk",
            True,
            torch.float16,
            "channels_last",
        ),  # history and saved beside both halves of one call
        ("ddim_eta", False, torch.float16, "channels_last"),  # clip and noise, two calls
        ("ddim_eta", True, torch.bfloat16, "channels_last"),
        ("pndm", False, torch.bfloat16, "contiguous"),
        ("ddim", True, torch.float32, "contiguous"),  # a network in float32
    ],
)
def test_guidance_and_16_bits(name: str, doubled: bool, dtype: torch.dtype, layout: str, device: Any) -> None:
    x = noise(SHAPES[1])
    run = Run(PLANS[name], x, layout, device, dtype=dtype, guidance=2.7, doubled=doubled)
    np.testing.assert_array_equal(bits(run.all()), bits(by_core(PLANS[name], x, dtype, 2.7)))
    shown = run.kept["network_input"]
    wanted = torch.cat([run.x] * (2 if doubled else 1)).to(dtype)
    if dtype is torch.bfloat16 and device.type == "cpu":  # the interpreter truncates
        assert ((shown.float() - wanted.float()).abs() <= wanted.float().abs() * 2**-7).all()
    else:
        assert torch.equal(shown, wanted)


def test_guidance_of_each_sample(device: Any) -> None:
    x, plan = noise(SHAPES[0]), PLANS["ddim"]
    run = Run(plan, x, "channels_last", device, guidance=0.0)
    run.kept["guidance"].copy_(torch.tensor([1.5, 4.0]))
    found = run.all()
    for n, weight in enumerate((1.5, 4.0)):
        alone = by_core(plan, x, torch.float32, weight)
        np.testing.assert_array_equal(bits(found[n]), bits(alone[n]))


@pytest.mark.parametrize("name", ["pndm", "ddpm"])
def test_same_bits_again_and_alone(name: str, device: Any) -> None:
    x = noise(SHAPES[2])
    together = Run(PLANS[name], x, "channels_last", device).all()
    assert torch.equal(together, Run(PLANS[name], x, "channels_last", device).all())
    alone = Run(PLANS[name], x[:1], "channels_last", device).all()
    assert torch.equal(together[:1], alone)


def test_the_pinned_configuration(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    monkeypatch.undo()
    x = noise((1, 4, 6, 7, 6))  # two programs
    run = Run(PLANS["ddpm"], x, "channels_last", device)
    np.testing.assert_array_equal(bits(run.all()), bits(by_core(PLANS["ddpm"], x, torch.float32, None)))


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_past_the_plan_nothing_happens(impl: str, device: Any) -> None:
    run = Run(PLANS["pndm"], noise(SHAPES[0]), "channels_last", device)
    before = [
        tensor.clone() for tensor in (run.all(impl), run.counter, run.kept["history"], run.kept["saved"])
    ]
    for step in (len(PLANS["pndm"]), -1):
        run.counter[0] = before[1][0] = step
        run.step(*run.outputs(0), impl=impl)
        for now, then in zip(
            (run.x, run.counter, run.kept["history"], run.kept["saved"]), before, strict=True
        ):
            assert torch.equal(now, then)


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_the_next_request_rewrites_the_tensors(impl: str, device: Any) -> None:
    """What a captured graph reads may change between replays: plan, guidance, seeds, x."""
    x, first, second = noise(SHAPES[0]), PLANS["ddim"], PLANS["ddim_eta"]
    run = Run(first, x, "channels_last", device, guidance=2.0)
    run.all(impl)
    table = plan_table(second.rows, device)
    run.table.weights.copy_(table.weights)
    run.table.slots.copy_(table.slots)
    run.counter.copy_(step_counter(2))
    run.kept["guidance"].fill_(3.0)
    run.x.copy_(torch.from_numpy(x))
    np.testing.assert_array_equal(bits(run.all(impl)), bits(by_core(second, x, torch.float32, 3.0)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])  # 3e38 * d overflows in x
@pytest.mark.parametrize("name", ["ddim", "dpm_solver"])  # the clip must not hide it
def test_the_first_step_that_is_not_finite(name: str, value: float, impl: str, device: Any) -> None:
    run = Run(PLANS[name], noise(SHAPES[1]), "channels_last", device)
    for step in range(4):
        out, _ = run.outputs(step)
        out[1, 2, 2, 1, 2] = value if step == 2 else 0
        run.step(out, impl=impl)
    overflows = name == "ddim"  # else the clip bounds x, whose input stays finite
    wanted = 2 if overflows or abs(value) != 3e38 else -1
    assert run.counter.tolist() == [4, 0, -1, wanted]


def test_minus_zero_stays(device: Any) -> None:
    """A term that a row does not have is not added as zero."""
    plan = PLANS["ddim"]
    run = Run(plan, np.full((1, 2, 2, 2), -0.0, np.float32), "contiguous", device)
    run.step(torch.full_like(run.x, -0.0) * float(np.sign(plan.rows["d"][0])))
    assert torch.signbit(run.x).all() and not run.x.any()


@triton.jit
def _far(
    x,
    out,
    weights,
    slots,
    bad,
    seeds,
    samples,
    step: tl.int32,
    first: tl.int64,
    voxels: tl.int64,
    C: tl.constexpr,
):
    sampler_step_triton._update(x, out, None, None, None, None, None, weights, slots, bad, seeds, samples, step,
                                first.to(tl.int64), first.to(tl.int64) * 0, 1, voxels, C, 1, 16)  # fmt: skip


@pytest.mark.slow
def test_offsets_past_two_to_the_31(device: Any) -> None:
    """The last values of 2^31 + 24: memory is reserved, only its last pages are touched. The noise is csrc's there."""
    voxels, c = 2**28 + 3, 8
    x = torch.empty(voxels, c, device=device)
    out = torch.empty(voxels, c, dtype=torch.float16, device=device)
    blocks = (voxels + 6) // 4
    first = (blocks - 2) * c  # 16 items: two blocks of each channel
    start = 4 * (blocks - 2) - 3
    x[start:], out[start:] = 0, 0
    plan, bad = PLANS["ddpm"], step_counter(1, device)[2:]
    table = plan_table(plan.rows[:1], device)
    ids = [identity(values[:1], device) for values in (SEEDS, SAMPLES)]
    _far[(1,)](x, out, table.weights, table.slots, bad, *ids, 0, first, voxels, c, enable_fp_fusion=False)
    for channel in range(c):
        last = (channel + 1) * voxels - 1
        key = [int(SEEDS[0]) & MAX32, int(SEEDS[0]) >> 32]
        four = _core.philox([last // 4, 1, int(SAMPLES[0]) & MAX32, int(SAMPLES[0]) >> 32], key)
        pair = philox._box_muller(*(torch.tensor([word]) for word in four[last % 4 // 2 * 2 :][:2]))
        normal = float(pair[last % 2].float())
        assert x[-1, channel].item() == np.float32(plan.rows["c"][0] * normal)


def state(**changes: Any) -> dict[str, Any]:
    plan = PLANS["pndm"]
    x = torch.zeros(1, 2, 2, 3, 2).movedim(-1, 1)
    return {
        "x": x, "out": x.clone().half(), "table": plan_table(plan.rows), "counter": step_counter(1),
        "seeds": torch.zeros(1, dtype=torch.int64), "samples": torch.zeros(1, dtype=torch.int64),
        "history": torch.zeros(plan.history_slots, 1, 2, 2, 3, 2).movedim(-1, 2), "saved": x.clone(),
        "uncond": x.clone().half(), "guidance": torch.ones(1).double(), "network_input": x.clone().half(), **changes,
    }  # fmt: skip


def test_a_launch_is_described_without_a_device() -> None:
    s = state()
    tensors = (s["x"], s["out"], s["uncond"], s["guidance"], s["history"], s["saved"], s["network_input"],
               s["table"].weights, s["table"].slots, s["counter"], s["seeds"], s["samples"])  # fmt: skip
    (real,) = sampler_step_triton.sampler_step_launches(*tensors)
    (described,) = sampler_step_triton.sampler_step_launches(*(tensor.to("meta") for tensor in tensors))
    assert described.grid == real.grid and described.constants == real.constants
    assert described.constants["C"] == 2 and described.arguments["voxels"] == 12
    assert not described.fuse_multiply_add  # csrc is compiled without it


def test_the_operator_is_sound() -> None:
    s = state()
    arguments = (s["x"], s["out"], s["uncond"], s["guidance"], s["history"], s["saved"], s["network_input"],
                 s["table"].weights, s["table"].slots, s["counter"], s["seeds"], s["samples"])  # fmt: skip
    torch.library.opcheck(torch.ops.volcast.sampler_step.default, arguments)
    bare = (s["x"], s["out"], None, None, None, None, None, *arguments[7:])
    torch.library.opcheck(torch.ops.volcast.sampler_step.default, bare)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_takes_it_whole(backend: str, device: Any) -> None:
    def three(run: Run) -> Tensor:
        for _ in range(3):
            run.step(torch.tanh(run.x), impl=None)
        return run.x * 1

    x, plan = noise(SHAPES[0]), PLANS["pndm"]
    plain, compiled = (Run(plan, x, "channels_last", device) for _ in range(2))
    whole: Callable[[Run], Tensor] = torch.compile(three, fullgraph=True, backend=backend)
    assert torch.equal(whole(compiled), three(plain))
    assert torch.equal(compiled.counter, plain.counter) and plain.counter[0] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 2)}, r"x has shape \(1, 2\): need N C \*spatial"),
        ({"x": torch.zeros(1, 0, 2, 2, 3)}, r"x has shape \(1, 0, 2, 2, 3\)"),
        ({"x": torch.zeros(1, 2, 2, 3, 4)[..., ::2]}, r"x has strides .*: need contiguous memory or channels last"),
        ({"x": torch.zeros(1, 2, 2, 2, 3).double()}, r"x has dtype float64: need float32"),
        ({"out": torch.zeros(1, 2, 2, 2, 3).int()}, r"dtype out int32, uncond float16"),
        ({"uncond": state()["x"]}, r"dtype out float16, uncond float32"),
        ({"out": torch.zeros(1, 2, 2, 2, 3).half()}, r"out has strides .*: need channels last, as x is"),
        ({"out": state()["out"][:, :, :1]}, r"out has shape \(1, 2, 1, 2, 3\): need \(1, 2, 2, 2, 3\)"),
        ({"history": torch.zeros(5, 1, 2, 2, 2, 3)}, r"history has strides .*: need channels last"),
        ({"history": state()["history"].half()}, r"history has dtype float16: need float32"),
        ({"history": state()["history"][0]}, r"history has shape \(1, 2, 2, 2, 3\): need \(1, 1, 2, 2, 2, 3\)"),
        ({"history": state()["history"][:2]}, r"2 history slots and saved=given: the plan needs \d slots and saved"),
        ({"history": None}, r"0 history slots"),
        ({"saved": None}, r"saved=None: the plan needs"),
        ({"saved": state()["x"].half()}, r"saved has dtype float16: need float32"),
        ({"network_input": torch.zeros(3, 2, 2, 3, 2).movedim(-1, 1)}, r"network_input has shape \(3, .*need \(1, 2"),
        ({"network_input": state()["x"].double()}, r"dtype network_input float64"),
        ({"guidance": None}, r"uncond and guidance belong together"),
        ({"uncond": None}, r"uncond and guidance belong together"),
        ({"guidance": torch.ones(1)}, r"guidance has dtype float32: need float64"),
        ({"guidance": torch.ones(2).double()}, r"guidance has shape \(2,\): need \(1,\)"),
        ({"counter": step_counter(1).long()}, r"counter has dtype int64: need int32"),
        ({"counter": step_counter(2)}, r"counter has shape \(4,\): need \(3,\)"),
        ({"counter": torch.zeros(6, dtype=torch.int32)[::2]}, r"counter has strides \(2,\): need contiguous"),
        ({"seeds": torch.zeros(1)}, r"seeds has dtype float32: need int64"),
        ({"samples": torch.zeros(2, dtype=torch.int64)}, r"samples has shape \(2,\)"),
        ({"table": state()["table"]._replace(weights=torch.zeros(5, 10).double())}, r"weights has shape \(5, 10\)"),
        ({"table": state()["table"]._replace(slots=torch.zeros(5, 6))}, r"slots has dtype float32: need int32"),
        ({"counter": step_counter(1, "meta")}, r"counter on meta.*move them to one device"),
        ({"impl": "cuda"}, r"impl='cuda': need one of eager, triton"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"\[sampler_step\] .*{message}|\[sampler_step\] {message}"):
        sampler_step(**state(**changes))


def test_rows_of_something_else_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"\[plan_table\] rows of shape \(3,\) without the fields \['a', 'd'"
    ):
        plan_table(np.zeros(3))
    with pytest.raises(ValueError, match=r"rows of shape \(0,\).*need at least one row"):
        plan_table(PLANS["ddim"].rows[:0])
