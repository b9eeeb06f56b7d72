from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, volume
from torch import Tensor

from volcast.kernels.configuration import pinned
from volcast.kernels.pointwise import pointwise
from volcast.kernels.pointwise_program import parse_program
from volcast.kernels.pointwise_triton import pointwise_launches

# Lanes past a tensor's end divide 0 by 0 and are not stored: the interpreter's NumPy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL_TILES = {"pointwise": {"tile": 128, "columns": 8, "warps": 4}}
# N, C, spatial; one number is L of tokens
SHAPES = [
    (1, 32, (3, 4, 3)),
    (2, 24, (5, 3)),  # padded to 32 channels where something is spread over it
    (3, 1, (2, 3, 4)),
    (2, 3, (7,)),  # rows of an odd number of bytes
    (1, 1, (1,)),
    (2, 100, (9,)),  # more than one block of columns, the last in part
    (3, 7, ()),
]
STEPS: dict[str, tuple[list[Any], Any]] = {
    "add": (["add", 0, 1], lambda a, b: a + b),
    "sub": (["sub", 0, 1], lambda a, b: a - b),
    "mul": (["mul", 0, 1], lambda a, b: a * b),
    "div": (["div", 1, 0], lambda a, b: b / a),
    "neg": (["neg", 0], lambda a, b: -a),
    "constant": (["constant", -0.3], lambda a, b: torch.full_like(a, -0.3)),
    "sigmoid": (["sigmoid", 0], lambda a, b: torch.sigmoid(a)),
    "silu": (["silu", 0], lambda a, b: F.silu(a)),
    "gelu": (["gelu", 0], lambda a, b: F.gelu(a)),
    "gelu_tanh": (["gelu_tanh", 0], lambda a, b: F.gelu(a, approximate="tanh")),
    "relu": (["relu", 0], lambda a, b: F.relu(a)),
    "leaky_relu": (["leaky_relu", 0, 0.2], lambda a, b: F.leaky_relu(a, 0.2)),
    "exp": (["exp", 0], lambda a, b: torch.exp(a)),
    "sqrt": (["sqrt", 1], lambda a, b: torch.sqrt(b)),
    "sin": (["sin", 0], lambda a, b: torch.sin(a)),
    "cos": (["cos", 0], lambda a, b: torch.cos(a)),
    "clamp both": (["clamp", 0, -0.5, 1], lambda a, b: a.clamp(-0.5, 1)),
    "clamp low": (["clamp", 0, -0.5, None], lambda a, b: a.clamp(min=-0.5)),
    "clamp high": (["clamp", 0, None, 0.25], lambda a, b: a.clamp(max=0.25)),
}  # fmt: skip
# (x0 * sigmoid(x1) + x2) / 2, and -x1, which another order of steps would lose
CHAIN = json.dumps([["sigmoid", 1], ["mul", 0, 3], ["add", 4, 2], ["constant", 2], ["div", 5, 6], ["neg", 1]])


def full(n: int, c: int, spatial: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    if len(spatial) >= 2:
        return volume(n, c, *spatial, dtype=dtype, device=device)
    return torch.randn(n, *spatial, c).to(device, dtype)


def chain(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    a, b, c = a.double(), b.double(), c.double()
    return [(a * torch.sigmoid(b) + c) / 2, -b.expand(torch.broadcast_shapes(a.shape, b.shape, c.shape))]


def check(inputs: list[Tensor], program: str, results: list[int], exact: list[Tensor]) -> list[Tensor]:
    eager = pointwise(inputs, program, results, impl="eager")
    fused = pointwise(inputs, program, results, impl="triton")
    with pinned(SMALL_TILES):
        again = pointwise(inputs, program, results, impl="triton")
    for y, small, e, truth in zip(fused, again, eager, exact, strict=True):
        assert_as_accurate(y, e, truth)
        assert torch.equal(y, small), "a tile changes no bit"
        assert y.stride() == e.stride()
    return fused


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_step_is_as_accurate_as_eager(name: str, dtype: torch.dtype, device: Any) -> None:
    torch.manual_seed(0)
    a = (3 * torch.randn(2, 5, 16)).to(device, dtype)
    a = torch.where(a.abs() < 0.1, 0.1, a)
    b = torch.rand(2, 5, 16).to(device, dtype)
    step, meaning = STEPS[name]
    check([a, b], json.dumps([step]), [2], [meaning(a.double(), b.double())])


def test_every_step_is_tested() -> None:
    for step, _ in STEPS.values():
        parse_program(json.dumps([step]), 2)
    with pytest.raises(ValueError) as error:
        parse_program('[["none"]]', 2)
    assert set(str(error.value).partition("need one of ")[2].split(", ")) == {
        step[0] for step, _ in STEPS.values()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "c", "spatial"), SHAPES)
def test_full_inputs_of_every_shape(
    n: int, c: int, spatial: tuple[int, ...], dtype: torch.dtype, device: Any
) -> None:
    torch.manual_seed(1)
    inputs = [full(n, c, spatial, dtype, device) for _ in range(3)]
    for y in check(inputs, CHAIN, [7, 8], chain(*inputs)):
        assert y.shape == inputs[0].shape and y.dtype == dtype
        lines = y.movedim(1, -1) if y.ndim >= 4 else y
        assert lines.is_contiguous()


@pytest.mark.parametrize(("n", "c", "spatial"), [shape for shape in SHAPES if shape[2]])
@pytest.mark.parametrize("kind", ["C", "N C", "1 C", "all axes", "of a wider row", "one for all samples"])
def test_inputs_are_spread(kind: str, n: int, c: int, spatial: tuple[int, ...], device: Any) -> None:
    torch.manual_seed(2)
    x = full(n, c, spatial, torch.float16, device)
    ones = (1,) * len(spatial)
    alike = (c, *ones) if x.ndim >= 4 else (*ones, c)
    per_sample = torch.randn(n, c, device=device)
    spread = {
        "C": per_sample[0],
        "N C": per_sample,
        "1 C": per_sample[:1],
        "all axes": per_sample.view(n, *alike).half(),
        "of a wider row": torch.randn(n, 3 * c, device=device)[:, c : 2 * c],
        "one for all samples": per_sample[:1].expand(n, c),
    }[kind]
    channels = torch.randn(c, device=device).to(torch.bfloat16)
    inputs = [channels, spread, x]
    exact = chain(channels.view(1, *alike), spread.reshape(-1, *alike), x)
    for y in check(inputs, CHAIN, [7, 8], exact):
        assert y.shape == x.shape and y.dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "c", "spatial"), [shape for shape in SHAPES if shape[2]])
def test_halves_of_a_wider_tensor_are_read_where_they_lie(
    n: int, c: int, spatial: tuple[int, ...], dtype: torch.dtype, device: Any
) -> None:
    """A GEGLU's: tokens @ weight is [N, L, 2 C]."""
    torch.manual_seed(3)
    wide = full(n, 2 * c, spatial, dtype, device)
    a, b = wide.chunk(2, 1 if wide.ndim >= 4 else -1)
    program = json.dumps([["gelu", 1], ["mul", 0, 2]])
    (y,) = check([a, b], program, [3], [a.double() * F.gelu(b.double())])
    assert y.movedim(1, -1).is_contiguous() if y.ndim >= 4 else y.is_contiguous()


def test_the_first_full_input_gives_the_dtype(device: Any) -> None:
    a, b = torch.randn(2, 3, 8, device=device).half(), torch.randn(2, 3, 8, device=device)
    channels = torch.randn(8, device=device).to(torch.bfloat16)
    (y,) = pointwise([channels, a, b], '[["add", 0, 1], ["add", 3, 2]]', [4], impl="triton")
    assert torch.equal(y, (channels.float() + a.float() + b).half()), "rounded once"


def test_a_program_without_steps_copies(device: Any) -> None:
    x = torch.randn(2, 3, 8, device=device)
    for impl in (None, "eager", "triton"):
        copies = pointwise([x], "[]", [0, 0], impl=impl)
        assert all(torch.equal(y, x) and y.data_ptr() != x.data_ptr() for y in copies)


@pytest.mark.parametrize(
    "name", ["relu", "leaky_relu", "clamp both", "clamp low", "clamp high", "silu", "gelu"]
)
def test_a_nan_stays_one(name: str, device: Any) -> None:
    x = torch.full((1, 2, 8), torch.nan, device=device)
    (y,) = pointwise([x], json.dumps([STEPS[name][0]]), [1], impl="triton")
    assert y.isnan().all()


@pytest.mark.parametrize("name", ["sigmoid", "silu", "gelu", "gelu_tanh"])
def test_large_arguments_saturate(name: str, device: Any) -> None:
    x = torch.tensor([-3e4, -200.0, 200.0, 3e4], device=device).view(1, 1, 4)
    (y,) = pointwise([x], json.dumps([STEPS[name][0]]), [1], impl="triton")
    right = torch.tensor([[[0.0, 0, 1, 1]]], device=device) * (1 if name == "sigmoid" else x)
    assert torch.equal(y + 0.0, right + 0.0)  # no sign of 0


@pytest.mark.parametrize("spread", [False, True])
def test_a_result_may_replace_an_input(spread: bool, device: Any) -> None:
    torch.manual_seed(4)
    wide = torch.randn(2, 37, 24, device=device)
    a, b, gain = wide[..., :12], wide[..., 12:], torch.randn(12, device=device)
    inputs, program = ([a, b, gain], CHAIN) if spread else ([a, b, b.clone()], CHAIN)
    expected = pointwise(inputs, program, [7, 8], impl="triton")
    y, launches = pointwise_launches(inputs, program, [7, 8], [b, a])
    assert y[0] is b and y[1] is a
    for launch in launches:
        launch()
    assert torch.equal(b, expected[0]) and torch.equal(a, expected[1])


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(1, 3, 7), r"out 0 has shape \(1, 3, 7\): need \(1, 3, 8\)"),
        (torch.zeros(1, 3, 8).half(), r"out 0 has dtype torch.float16: need torch.float32"),
        (torch.zeros(1, 8, 3).mT, r"out 0 of shape \(1, 3, 8\) has strides"),
        (torch.zeros(1, 3, 8, device="meta"), r"out 0 on meta"),
    ],
)
def test_an_out_that_does_not_fit_is_named(out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=rf"\[pointwise\] {message}"):
        pointwise_launches([torch.zeros(1, 3, 8)], "[]", [0], [out])
    with pytest.raises(ValueError, match=r"\[pointwise\] 2 outs for 1 results"):
        pointwise_launches([torch.zeros(1, 3, 8)], "[]", [0], [torch.zeros(1, 3, 8)] * 2)


@pytest.mark.slow
def test_offsets_past_two_to_the_31(device: Any) -> None:
    """Rows 2^26 elements apart: 5 GiB of memory are reserved, only the pages of the rows are touched."""
    rows, apart, c = 40, 2**26, 8
    memory = torch.empty((rows - 1) * apart + c, dtype=torch.float16, device=device)
    x, far = torch.randn(1, rows, c).to(device, torch.float16), memory.as_strided((1, rows, c), (0, apart, 1))
    far.copy_(x)
    with pinned(SMALL_TILES):
        (launch,) = pointwise_launches([far], '[["neg", 0]]', [1], [far])[1]
        launch()
    assert torch.equal(far, -x)


def test_a_volume_of_eight_billion_elements_has_a_grid() -> None:
    x = torch.empty(1, 512, 512, 512, 64, device="meta", dtype=torch.float16).movedim(-1, 1)
    (y,), (launch,) = pointwise_launches([x, x[0, :, 0, 0, 0]], '[["add", 0, 1]]', [2])
    assert y.is_meta and y.stride() == x.stride()
    tile = launch.constants["ROWS"] * launch.constants["COLUMNS"]
    assert launch.grid[0] * launch.grid[1] * tile == x.numel() > 2**31


def test_the_operator_is_sound(device: Any) -> None:
    x, gain = volume(2, 8, 3, 4, dtype=torch.float32, device=device), torch.randn(2, 8, device=device)
    torch.library.opcheck(torch.ops.volcast.pointwise.default, ([x, gain, x.clone()], CHAIN, [7, 0]))


def test_torch_compile_takes_it_whole(device: Any) -> None:
    x, gain = volume(2, 8, 3, 4, 5, dtype=torch.float32, device=device), torch.randn(8, device=device)

    def block(x: Tensor) -> Tensor:
        y, z = pointwise([x, gain], '[["mul", 0, 1], ["silu", 2]]', [2, 3])
        return y + z

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))


X = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"program": "[[}"}, r"program is no JSON"),
        ({"program": '{"add": 0}'}, r"program=.*need a list of steps"),
        ({"program": '[["add", 0, 0], ["tanh", 1]]'}, r'step 1 \["tanh", 1\]: need one of add, sub'),
        ({"program": '["add"]'}, r'step 0 "add": need one of'),
        ({"program": '[["add", 0]]'}, r'step 0 \["add", 0\]: need 2 arguments'),
        ({"program": '[["add", 0, 1]]'}, r'step 0 \["add", 0, 1\]: register 1: need one of 0 to 0'),
        ({"program": '[["neg", -1]]'}, r"step 0 .*register -1"),
        ({"program": '[["neg", 0.0]]'}, r"step 0 .*register 0.0"),
        ({"program": '[["neg", true]]'}, r"step 0 .*register True"),
        ({"program": '[["constant", NaN]]'}, r"step 0 .*need a finite number"),
        ({"program": '[["constant", 1e39]]'}, r"step 0 .*need a finite number of float32"),
        ({"program": '[["constant", "1"]]'}, r"step 0 .*need a finite number"),
        ({"program": '[["leaky_relu", 0, null]]'}, r"step 0 .*need a finite number"),
        ({"program": '[["clamp", 0, null, null]]'}, r"step 0 .*need a bound"),
        ({"results": []}, r"results=\[\]: need 1 to 4 registers of 0 to 1"),
        ({"results": [2]}, r"results=\[2\]: need 1 to 4 registers of 0 to 1"),
        ({"results": [0] * 5}, r"need 1 to 4 registers"),
        ({"inputs": []}, r"0 inputs: need 1 to 8"),
        ({"inputs": [X] * 9}, r"9 inputs: need 1 to 8"),
        ({"inputs": [X.double()]}, r"input 0 has dtype torch.float64"),
        ({"inputs": [X, X[:, :0]]}, r"input 1 has .*no empty axis"),
        ({"inputs": [torch.zeros(8)]}, r"largest input has shape \(8,\)"),
        ({"inputs": [X, torch.zeros(7)]}, r"input 1 has shape \(7,\) beside \(2, 3, 8\)"),
        ({"inputs": [X, torch.zeros(2, 8, 1)]}, r"input 1 has shape \(2, 8, 1\)"),
        ({"inputs": [X, torch.zeros(3, 8)]}, r"input 1 has shape \(3, 8\)"),
        ({"inputs": [X, torch.zeros(16)[::2]]}, r"input 1 .*need 1 along the channels; call .contiguous\(\)"),
        ({"inputs": [X, torch.zeros(2, 8, 3).mT]}, r"input 1 .*need rows of channels at equal distances"),
        ({"inputs": [X[:, :2]]}, r"input 0 .*need rows of channels at equal distances"),
        ({"inputs": [X[:, :1].expand(2, 3, 8)]}, r"input 0 .*need rows of channels at equal distances"),
        ({"inputs": [torch.zeros(1, 8, 2, 3, 4)]}, r"call .contiguous\(memory_format=torch.channels_last_3d"),
        ({"inputs": [torch.zeros(1, 8, 2, 3)]}, r"call .contiguous\(memory_format=torch.channels_last\)"),
        ({"inputs": [X, torch.zeros(8, device="meta")]}, r"input 1 on meta: move them to one device"),
        ({"impl": "cuda"}, r"impl='cuda': need one of eager, triton"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"\[pointwise\].*{message}"):
        pointwise(**{"inputs": [X], "program": '[["neg", 0]]', "results": [1], **arguments})


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_without_spills(capability: int) -> None:
    """In a process of its own: the interpreter compiles nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 6
    assert all(line["spill_bytes"] == 0 for line in lines), lines


def _compiled(capability: int) -> None:
    """A line for each kernel of GEGLU, a chain with spread inputs, and eight inputs with four results."""
    from volcast.kernels.compile_triton import compile_launch

    for dtype in (torch.float16, torch.float32):
        wide = torch.empty(1, 64, 2560, dtype=dtype, device="meta")
        x = torch.empty(2, 4, 4, 4, 24, dtype=dtype, device="meta").movedim(-1, 1)
        gain = torch.empty(24, device="meta")
        steps = [["add", 0, 1], *(["mul", i + 1, i] for i in range(1, 7))]
        for inputs, program, results in (
            (list(wide.chunk(2, -1)), [["gelu", 1], ["mul", 0, 2]], [3]),
            ([x, gain, x[:, :, 0, 0, 0]], json.loads(CHAIN), [7, 8]),
            ([wide] * 8, steps, [8, 10, 12, 14]),
        ):
            (launch,) = pointwise_launches(inputs, json.dumps(program), results)[1]
            print(json.dumps({"spill_bytes": compile_launch(launch, capability).spill_bytes}))


if __name__ == "__main__":
    _compiled(int(sys.argv[1]))
