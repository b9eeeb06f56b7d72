"""The checks at load find what is wrong, and only that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_programs import RandomProgram
from torch import Tensor

from volcast.runtime.device import fused, golden, operations
from volcast.runtime.device.executor import Executor
from volcast.runtime.device.golden import batch_invariant, check_convolutions, find_variant
from volcast.runtime.device.memory import Spec
from volcast.runtime.device.operations import dense
from volcast.runtime.device.program import DeviceProgram, Operation

CPU = torch.device("cpu")
SIDES = (4, 5, 3)


def network(width: int = 16) -> tuple[DeviceProgram, dict[str, Tensor]]:
    """Convolutions, products, a norm, attention: x `N 8 D H W`, row `[N, 2 width]`."""
    generator = torch.Generator().manual_seed(0)
    kept = {"stride": [1, 1, 1], "padding": [1, 1, 1], "dilation": [1, 1, 1], "groups": 1}
    halved = kept | {"stride": [2, 2, 2]}
    norm = {"groups": 4, "eps": 1e-5, "activation": "silu"}
    listed: list[tuple[str, tuple[str | None, ...], tuple[str, ...], dict[str, Any]]] = [
        ("convolution", ("x", "w0", "b"), ("a",), kept),
        ("linear", ("row", "w1"), ("r",), {}),
        ("group_norm", ("a", "one", "b", "r"), ("n",), norm),
        ("convolution", ("n", "w2", "b"), ("c",), kept),
        ("convolution", ("c", "w2"), ("d",), halved),
        ("tokens", ("d",), ("t",), {}),
        ("linear", ("t", "w3", "b3"), ("qkv",), {}),
        *(
            ("columns", ("qkv",), (name,), {"start": i * width, "stop": (i + 1) * width})
            for i, name in enumerate("qkv")
        ),
        ("attention", ("q", "k", "v"), ("m",), {"heads": 2, "scale": 0.3}),
        ("linear", ("m", "w4", None, "t"), ("y",), {}),
    ]
    weights = {
        "w0": (width, 8, 3, 3, 3), "w1": (2 * width, width), "w2": (width, width, 3, 3, 3), "w3": (width, 3 * width),
        "w4": (width, width), "b": (width,), "b3": (3 * width,), "one": (width,),
    }  # fmt: skip
    return DeviceProgram(
        inputs=("x", "row"), outputs=("y",),
        operations=tuple(Operation(kind=k, inputs=i, outputs=o, settings=s) for k, i, o, s in listed),  # type: ignore[arg-type]
    ), {name: dense(torch.randn(shape, generator=generator) / 8) for name, shape in weights.items()}  # fmt: skip


def specs(batch: int, width: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, Spec]:
    return {"x": ((batch, 8, *SIDES), dtype), "row": ((batch, 2 * width), dtype)}


def results(bound: Executor, data: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, x in data.items():
        bound.inputs[name].copy_(x)
    bound.run()
    return {name: y.clone() for name, y in bound.outputs.items()}


def assert_sample_by_sample(make: Any, data: dict[str, Tensor], batch: int) -> None:
    """`make(batch, per_sample)`: with what `find_variant` names, a sample has the bits that it has alone."""
    variant = find_variant(make(batch, frozenset()))
    together = results(make(batch, variant), data)
    for sample in range(batch):
        alone = results(make(1, frozenset()), {name: x[sample : sample + 1] for name, x in data.items()})
        assert all(torch.equal(y, together[name][sample : sample + 1]) for name, y in alone.items())


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_has_the_same_bits_in_any_batch(batch: int, dtype: torch.dtype) -> None:
    program, weights = network()
    weights = {name: w.to(dtype) for name, w in weights.items()}
    data = {name: torch.randn(shape).to(dtype) for name, (shape, _) in specs(batch).items()}

    def make(n: int, variant: frozenset[str]) -> Executor:
        return Executor(program, weights, specs(n, dtype=dtype), CPU, per_sample=variant)

    assert_sample_by_sample(make, data, batch)


@pytest.mark.parametrize("seed", range(6))
def test_random_programs_have_the_same_bits_in_any_batch(seed: int) -> None:
    """Operations of all kinds; all are sent sample by sample, those too that would not have to."""
    three = RandomProgram(seed, 15, batch=3)
    single = {name: ((1, *shape[1:]), dtype) for name, (shape, dtype) in three.inputs.items()}
    whole = Executor(three.program, three.weights, three.inputs, CPU)
    every = frozenset(call.operation.outputs[0] for call in whole.calls if call.samples is not None)
    assert len(every) == len(whole.calls)
    data = three.data()
    together = results(Executor(three.program, three.weights, three.inputs, CPU, per_sample=every), data)
    for sample in range(3):
        alone = Executor(three.program, three.weights, single, CPU)
        for name, y in results(alone, {n: x[sample : sample + 1] for n, x in data.items()}).items():
            assert torch.equal(y, together[name][sample : sample + 1])


def test_the_same_seed_finds_the_same() -> None:
    program, weights = network()
    bound = Executor(program, weights, specs(8), CPU)
    assert find_variant(bound) == find_variant(bound)
    assert find_variant(Executor(program, weights, specs(1), CPU)) == frozenset()


def test_an_operation_that_looks_at_its_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention whose bits depend on the number of samples, by one unit in the last place of one number."""
    original = operations._EVALUATE["attention"]

    def variant(inputs: list[Any], settings: dict[str, Any]) -> list[Tensor]:
        (y,) = original(inputs, settings)
        if y.device.type != "meta" and y.shape[0] > 1:
            y[-1, -1, -1] = torch.nextafter(y[-1, -1, -1], torch.tensor(torch.inf))
        return [y]

    program, weights = network()
    before = find_variant(Executor(program, weights, specs(8), CPU))
    assert "m" not in before
    monkeypatch.setitem(operations._EVALUATE, "attention", variant)
    bound = Executor(program, weights, specs(8), CPU)
    assert find_variant(bound) == before | {"m"}
    (call,) = (call for call in bound.calls if call.operation.kind == "attention")
    assert not batch_invariant(call)

    def make(n: int, per_sample: frozenset[str]) -> Executor:
        return Executor(program, weights, specs(n), CPU, per_sample=per_sample)

    assert_sample_by_sample(make, {n: torch.randn(shape) for n, (shape, _) in specs(8).items()}, 8)


def test_a_check_leaves_weights_alone() -> None:
    program, weights = network()
    view = Operation(kind="columns", inputs=("w3",), outputs=("part",), settings={"start": 0, "stop": 16})
    last = Operation(kind="linear", inputs=("y", "part"), outputs=("z",))
    program = DeviceProgram(
        inputs=program.inputs, outputs=("z",), operations=(*program.operations, view, last)
    )
    before = {name: w.clone() for name, w in weights.items()}
    find_variant(Executor(program, weights, specs(2), CPU))
    assert all(torch.equal(w, before[name]) for name, w in weights.items())


@pytest.mark.parametrize("size", [5, 16])
def test_samples_at_odd_bytes_go_through_memory_that_lies_as_the_first(size: int) -> None:
    """Five numbers of 2 bytes a sample: every other one begins where no vector load may. Or 16: there it may, but a
    library's heuristics look further."""
    spec: Spec = ((3, size), torch.float16)
    program = DeviceProgram(
        inputs=("x",), outputs=("y",),
        operations=(Operation(kind="softmax", inputs=("x",), outputs=("y",), settings={"axis": -1}),),
    )  # fmt: skip
    bound = Executor(program, {}, {"x": spec}, CPU, per_sample=frozenset({"y"}))
    seen: list[tuple[int, int]] = []
    (call,) = bound.calls

    def form(operation: Operation, inputs: Any, outputs: list[Tensor]) -> None:
        seen.append((inputs[0].data_ptr() % 256, outputs[0].data_ptr() % 256))
        call.form(operation, inputs, outputs)

    x = torch.randn(3, size).half()
    bound.inputs["x"].copy_(x)
    type(call)(
        operation=call.operation, form=form, inputs=call.inputs, outputs=call.outputs, values=call.values,
        samples=call.samples,
    ).by_sample()  # fmt: skip
    assert len(seen) == 3 and len(set(seen)) == 1
    torch.testing.assert_close(bound.outputs["y"], torch.softmax(x, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", [20, 22])
def test_right_convolutions_pass(seed: int, dtype: torch.dtype) -> None:
    made = RandomProgram(seed, 40, dtype=dtype)
    kinds = {operation.kind for operation in made.program.operations}
    assert kinds >= {"convolution", "transposed_convolution"}
    check_convolutions(made.program, made.weights, made.inputs, CPU)


def test_each_signature_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    original = golden._check_convolution

    def counted(operation: Operation, shape: tuple[int, ...], *rest: Any) -> None:
        seen.append(shape)
        original(operation, shape, *rest)

    monkeypatch.setattr(golden, "_check_convolution", counted)
    program, weights = network()
    check_convolutions(program, weights, specs(4) | {"x": ((4, 8, 90, 20, 7), torch.float32)}, CPU)
    assert seen == [(1, 8, 8, 8, 7), (1, 16, 8, 8, 7), (1, 16, 8, 8, 7)]  # the last has another stride


def broken(original: Any, break_it: Any) -> Any:
    def convolution(inputs: list[Any], settings: dict[str, Any]) -> list[Tensor]:
        x, weight, *rest = inputs
        return list(break_it(original, x, weight, rest, settings))

    return convolution


def one_tap_less(original: Any, x: Tensor, weight: Tensor, rest: list[Any], settings: Any) -> Any:
    if x.dtype == torch.bfloat16 and x.device.type != "meta":
        weight = weight.clone()
        weight[..., 0, 0, 0] = 0
    return original([x, weight, *rest], settings)


def first_channel_wrong(original: Any, x: Tensor, weight: Tensor, rest: list[Any], settings: Any) -> Any:
    (y,) = original([x, weight, *rest], settings)
    if x.dtype == torch.bfloat16 and x.device.type != "meta":
        y[:, 0] = y[:, 1]
    return [y]


def not_a_number(original: Any, x: Tensor, weight: Tensor, rest: list[Any], settings: Any) -> Any:
    (y,) = original([x, weight, *rest], settings)
    if x.dtype == torch.bfloat16 and x.device.type != "meta":
        y[0, -1, -1, -1, -1] = torch.nan
    return [y]


@pytest.mark.parametrize("break_it", [one_tap_less, first_channel_wrong, not_a_number])
@pytest.mark.parametrize("width", [16, 256])
def test_a_wrong_library_is_refused_by_name(
    break_it: Any, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = operations._EVALUATE["convolution"]
    monkeypatch.setitem(operations._EVALUATE, "convolution", broken(original, break_it))
    program, weights = network(width)
    check_convolutions(program, weights, specs(2, width), CPU)  # right in float32
    half = {name: w.bfloat16() for name, w in weights.items()}
    with pytest.raises(
        ValueError, match=r"\[convolution\] a, .*bfloat16 result is off by .*PyTorch 2.*--precision fp16"
    ):
        check_convolutions(program, half, specs(2, width, torch.bfloat16), CPU)


def test_the_fused_form_passes(device: torch.device) -> None:
    """What a GPU's check runs: the library writes into given memory, without the bias."""
    program, weights = network()
    generator = torch.Generator().manual_seed(0)
    for operation in program.operations:
        if operation.kind == "convolution":
            assert operation.inputs[1] is not None
            shape = tuple(weights[operation.inputs[1]].shape)
            golden._check_convolution(
                operation, (1, shape[1], *SIDES), shape, torch.float32, device, fused.FORMS["convolution"]
            )
    assert set(golden._signs((1000,), generator).tolist()) == {-1.0, 1.0}
