"""The executor: every operation in the arena against float64, what is read against what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate
from device_exact import exact
from device_programs import RandomProgram, run
from onnxruntime import InferenceSession
from torch import Tensor

from volcast.export.lower import lower
from volcast.export.to_cuda import device_draft, stored_weights
from volcast.kernels import Impl
from volcast.kernels.configuration import configuration, pinned
from volcast.runtime.device import fused
from volcast.runtime.device.executor import Call, Executor
from volcast.runtime.device.memory import Spec
from volcast.runtime.device.operations import dense, evaluate
from volcast.runtime.device.program import DeviceProgram, Operation
from volcast.runtime.spec import Precision

CPU = torch.device("cpu")
SEEDS = (171, 195, 579)  # their programs have every kind that has a fused form


def executor(made: RandomProgram, device: torch.device = CPU, **more: Any) -> Executor:
    weights = {name: weight.to(device) for name, weight in made.weights.items()}
    return Executor(made.program, weights, made.inputs, device, **more)


def walk(bound: Executor, data: dict[str, Tensor]) -> None:
    """Run call by call. Each reads the bits that were written under that name, and is as accurate as its definition."""
    bound.arena.fill_(255)  # NaN in all three dtypes
    for name, x in data.items():
        bound.inputs[name].copy_(x)
    written = {name: x.clone() for name, x in bound.inputs.items()}
    sources = bound.plan.views
    views: dict[str, Tensor] = {}
    for operation in bound.program.operations:
        call = next((call for call in bound.calls if call.operation is operation), None)
        known = [
            None if name is None else {**bound.weights, **written, **views}.get(name)
            for name in operation.inputs
        ]
        if call is None:
            assert operation.outputs[0] in sources
            (views[operation.outputs[0]],) = evaluate(operation, known)
            continue
        sizes_only = ("cast", "columns", "reshape", "resize", "tokens", "volume")
        numbers = 1 if operation.kind in sizes_only else len(known)
        for x, value in zip(call.inputs[:numbers], known[:numbers], strict=True):
            assert (x is None) == (value is None)
            assert x is None or torch.equal(x, value)
        assert_call(call, known)
        written |= {name: y.clone() for name, y in zip(operation.outputs, call.outputs, strict=True)}
    for name, y in bound.outputs.items():
        assert torch.equal(y, written[name])


def assert_call(call: Call, inputs: Sequence[Tensor | None]) -> None:
    wide = [None if x is None else x.double() for x in inputs]
    wanted = exact(call.operation, wide)
    definition = evaluate(call.operation, inputs)
    call.at_once()
    for y, eager, right in zip(call.outputs, definition, wanted, strict=True):
        if right.abs().max() > 0:
            assert_as_accurate(y.cpu(), eager.cpu(), right.cpu())
        else:
            assert torch.equal(y, eager)


@pytest.mark.parametrize("seed", range(20))
def test_every_operation_reads_what_was_written_and_computes_its_definition(seed: int) -> None:
    made = RandomProgram(seed, 20)
    walk(executor(made, impl="eager"), made.data())


def few_programs(single: bool) -> dict[str, dict[str, int]]:
    """GroupNorm in one launch or in two, with as many programs as the interpreter runs in a second."""
    found = {
        name: configuration(name, torch.float32, 1) for name in ("group_norm_single", "group_norm_split")
    }
    found["group_norm_single"]["group_elements"] = 2**20 if single else 0
    found["group_norm_split"] |= {"programs": 4, "apply_programs": 4}
    return found


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_fused_forms_write_into_the_arena_what_the_definitions_give(
    seed: int, single: bool, device: torch.device
) -> None:
    made = RandomProgram(seed, 16)
    with pinned(few_programs(single)):
        walk(executor(made, device, impl="triton"), {k: v.to(device) for k, v in made.data().items()})


def test_the_fused_forms_above_were_all_kinds_in_place_too() -> None:
    kinds, taken = set(), set()
    for seed in SEEDS:
        made = RandomProgram(seed, 16)
        kinds |= {operation.kind for operation in made.program.operations}
        makers = {name: operation for operation in made.program.operations for name in operation.outputs}
        taken |= {(makers[name].kind, len(makers[name].outputs)) for name in executor(made).plan.in_place}
    assert kinds >= fused.FORMS.keys()
    assert {kind for kind, _ in taken} == {"pointwise", "linear", "layer_norm", "group_norm"}
    assert ("group_norm", 2) in taken


def test_a_run_is_the_walk_and_gives_the_same_again() -> None:
    for seed in range(10):
        made = RandomProgram(seed + 200, 20)
        data = made.data()
        bound = executor(made)
        walk(bound, data)
        first = {name: y.clone() for name, y in bound.outputs.items()}
        bound.arena.fill_(255)
        for name, x in data.items():
            bound.inputs[name].copy_(x)
        bound.run()
        assert all(torch.equal(y, first[name]) for name, y in bound.outputs.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_have_the_program_s_dtype(dtype: torch.dtype) -> None:
    made = RandomProgram(6, 20, dtype=dtype)
    bound = executor(made)
    walk(bound, made.data())
    assert {y.dtype for y in bound.outputs.values()} == {dtype}


def test_kept_inputs_survive_a_run() -> None:
    made = RandomProgram(3, 25)
    data = made.data()
    bound = executor(made, keep=frozenset({"x", "row"}))
    for name, x in data.items():
        bound.inputs[name].copy_(x)
    bound.run()
    assert torch.equal(bound.inputs["x"], data["x"]) and torch.equal(bound.inputs["row"], data["row"])


def test_programs_share_an_arena() -> None:
    made = [RandomProgram(seed, 20) for seed in (1, 2)]
    alone = [executor(one) for one in made]
    arena = torch.empty(max(one.plan.bytes for one in alone), dtype=torch.uint8)
    for one, own in zip(made, alone, strict=True):
        shared = executor(one, arena=arena)
        data = one.data()
        for bound in (own, shared):
            for name, x in data.items():
                bound.inputs[name].copy_(x)
            bound.run()
        assert shared.arena.data_ptr() == arena.data_ptr()
        for name, y in shared.outputs.items():
            torch.testing.assert_close(y, own.outputs[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"need uint8 \[\d+\] or more"):
        executor(made[0], arena=arena[: alone[0].plan.bytes - 1])
    with pytest.raises(ValueError, match="need uint8"):
        executor(made[0], arena=arena.view(torch.int8))


def test_an_executor_says_what_it_takes() -> None:
    made = RandomProgram(1, 20)
    with pytest.raises(ValueError, match="per_sample=nothing"):
        executor(made, per_sample=frozenset({"nothing"}))
    with pytest.raises(ValueError, match="is missing"):
        Executor(made.program, {}, made.inputs, CPU)


def settings(
    axes: int, stride: int = 1, padding: int = 1, dilation: int = 1, groups: int = 1
) -> dict[str, Any]:
    return {
        "stride": [stride] * axes,
        "padding": [padding] * axes,
        "dilation": [dilation] * axes,
        "groups": groups,
    }


@pytest.mark.parametrize("side", [1, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_slabs_are_the_whole_convolution(side: int, stride: int, padding: int, dilation: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = dense(torch.randn(2, 4, 13, 5, 6, generator=generator))
    weight = dense(torch.randn(6, 2, side, 1, 3, generator=generator))
    how = settings(3, stride, padding, dilation, groups=2)

    def convolution(dtype: torch.dtype) -> Tensor:
        return torch.nn.functional.conv3d(
            x.to(dtype), weight.to(dtype), None, stride, padding, dilation, groups=2
        )

    eager, right = convolution(torch.float32), convolution(torch.float64)
    reach = dilation * (side - 1)
    least = max((reach + 1) * x[0, :, 0].numel(), eager[0, :, 0].numel())
    for limit in (least, least + 100, 3 * least, x[0].numel() + 400, x.numel() + eager.numel()):
        out = dense(torch.full_like(eager, torch.nan))
        fused.convolve(x, weight, how, out, limit)
        assert_as_accurate(out, eager, right)
    with pytest.raises(ValueError, match="make the volume smaller"):
        fused.convolve(x, weight, how, dense(torch.empty_like(eager)), least - 1)


def test_no_slab_passes_the_limit_and_few_read_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, bool]] = []
    original = fused._library_convolution

    def seen(x: Tensor, weight: Tensor, how: Any, padding: Any, out: Tensor) -> None:
        calls.append((x.numel(), out.numel(), x.untyped_storage().data_ptr() != base))
        original(x, weight, how, padding, out)

    monkeypatch.setattr(fused, "_library_convolution", seen)
    x = dense(torch.randn(1, 2, 40, 3, 3))
    base = x.untyped_storage().data_ptr()
    weight, out = dense(torch.randn(4, 2, 3, 3, 3)), dense(torch.empty(1, 4, 40, 3, 3))
    fused.convolve(x, weight, settings(3), out, 200)
    assert all(max(read, made) <= 200 for read, made, _ in calls)
    copies = [made for _, made, copied in calls if copied]
    assert copies == [36, 36]  # one plane of the result at either end
    assert len(calls) == 2 + -(-38 // 5)


def test_a_convolution_along_one_axis() -> None:
    generator = torch.Generator().manual_seed(0)
    operation = Operation(kind="convolution", inputs=("x", "w", "b"), outputs=("y",), settings=settings(1, 2))
    x, w, b = (torch.randn(size, generator=generator) for size in ((2, 4, 9), (6, 4, 3), (6,)))
    out = torch.empty(2, 6, 5)
    fused.FORMS["convolution"](operation, [x, w, b], [out])
    right = torch.nn.functional.conv1d(x.double(), w.double(), b.double(), 2, 1)
    assert_as_accurate(out, evaluate(operation, [x, w, b])[0], right)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", ["none", "apart", "taken over"])
@pytest.mark.parametrize("source", ["vectors", "tokens", "columns", "volume"])
def test_products_add_the_bias_and_the_residual(bias: bool, residual: str, source: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return dense(torch.randn(shape, generator=generator))

    x = {
        "vectors": lambda: made(3, 8), "tokens": lambda: made(2, 5, 8), "columns": lambda: made(2, 5, 24)[..., 8:16],
        "volume": lambda: made(2, 8, 2, 3, 4),
    }[source]()  # fmt: skip
    shape = (x.shape[0], 16, *x.shape[2:]) if x.ndim >= 4 else (*x.shape[:-1], 16)
    w, b = made(8, 16), made(16) if bias else None
    r = None if residual == "none" else made(*shape)
    out = r if residual == "taken over" else dense(torch.full(shape, torch.nan))
    assert out is not None
    operation = Operation(kind="linear", inputs=("x", "w", "b", "r"), outputs=("y",))
    eager = evaluate(operation, [x, w, b, r])[0].clone()
    right = exact(operation, [None if t is None else t.double() for t in (x, w, b, r)])[0]
    fused.FORMS["linear"](operation, [x, w, b, r], [out])
    assert_as_accurate(out, eager, right)


def test_packing_turns_convolutions_and_leaves_what_is_right() -> None:
    operations = (
        Operation(kind="convolution", inputs=("x", "w", "b"), outputs=("y",), settings=settings(3)),
        Operation(kind="tokens", inputs=("y",), outputs=("t",)),
        Operation(kind="linear", inputs=("t", "l", "lb"), outputs=("z",)),
    )
    program = DeviceProgram(inputs=("x",), outputs=("z",), operations=operations)
    half = {"w": torch.randn(8, 4, 3, 3, 3).half(), "b": torch.randn(8), "l": torch.randn(8, 8).half()}
    packed = fused.pack(program, {**half, "lb": torch.randn(8)})
    assert packed["w"].movedim(1, -1).is_contiguous() and torch.equal(packed["w"], half["w"])
    assert packed["lb"].dtype == torch.float16 and packed["b"].dtype == torch.float32
    again = fused.pack(program, packed)
    assert {name: w.data_ptr() for name, w in again.items()} == {n: w.data_ptr() for n, w in packed.items()}


def test_scratch_is_what_a_kernel_takes_besides() -> None:
    """A split GroupNorm leaves (mean, M2) float32 a sample, group and program; a product nothing."""
    spec: Spec = ((2, 8, 40, 40, 40), torch.float32)
    norm = Operation(
        kind="group_norm", inputs=("x", "w", "b"), outputs=("y",),
        settings={"groups": 4, "eps": 1e-5, "activation": "none"},
    )  # fmt: skip
    x, y = (dense(torch.empty(spec[0], device="meta")) for _ in range(2))
    w = torch.empty(8, device="meta")
    found = fused.launches(norm, [x, w, w], [y])
    assert found is not None
    partial = found[0].arguments["partial"]
    assert isinstance(partial, Tensor) and partial.shape[:3] == (2, 4, 2)
    assert fused.scratch_bytes(norm, [x, w, w], [y]) == partial.nbytes
    product = Operation(kind="linear", inputs=("x", "w"), outputs=("y",))
    assert fused.scratch_bytes(product, [x, torch.empty(8, 8)], [y]) == 0


def test_the_peak_is_arena_weights_and_the_largest_scratch() -> None:
    x = torch.empty(2, 8, 40, 40, 40)
    program = DeviceProgram(
        inputs=("x",), outputs=("z",),
        operations=(
            Operation(kind="linear", inputs=("x", "w"), outputs=("y",)),
            Operation(kind="group_norm", inputs=("y", "one", "one"), outputs=("z",),
                      settings={"groups": 4, "eps": 1e-5, "activation": "none"}),
        ),
    )  # fmt: skip
    weights = {"w": torch.empty(8, 8), "one": torch.empty(8)}
    spec = {"x": (tuple(x.shape), x.dtype)}
    norm = program.operations[1]
    partial = fused.scratch_bytes(norm, [dense(x), weights["one"], weights["one"]], [dense(x)])
    for impl, besides in (("triton", partial), ("eager", x.nbytes)):
        bound = Executor(program, weights, spec, CPU, impl=impl)
        assert bound.plan.bytes == 2 * x.nbytes  # the norm overwrites the product
        assert bound.peak_bytes() == 2 * x.nbytes + 64 * 4 + 8 * 4 + besides


def test_the_form_is_asked_for_by_name() -> None:
    made = RandomProgram(1, 5)
    assert executor(made).impl is Impl.EAGER
    assert executor(made, impl="triton").impl is Impl.TRITON


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["decode", "step"])
def test_the_bundled_model_against_onnx_runtime(default_artifact_folder: Path, name: str, batch: int) -> None:
    """Passes and arena together: as near to float64 as PyTorch is on the program as exported; so is ONNX Runtime."""
    file = default_artifact_folder / f"{name}.onnx"
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    draft, raw = device_draft(file), lower(file)
    weights = stored_weights(draft, Precision.FP32)
    generator = torch.Generator().manual_seed(batch)
    sides = iter((8, 4, 8))
    data = {}
    for tensor in session.get_inputs():
        # Named axes: the batch, and a latent's sides.
        shape = [
            batch if i == 0 else next(sides) if isinstance(size, str) else size
            for i, size in enumerate(tensor.shape)
        ]
        data[tensor.name] = dense(torch.randn(shape, generator=generator))
    bound = Executor(draft.program(), weights, {n: (tuple(x.shape), x.dtype) for n, x in data.items()}, CPU)
    for key, x in data.items():
        offset = draft.offsets.get(key)
        bound.inputs[key].copy_(x if offset is None else x + weights[offset])
    bound.run()
    theirs = session.run(None, {key: x.numpy() for key, x in data.items()})
    right, eager = (run(raw.operations, {**raw.weights, **data}, define) for define in (exact, evaluate))
    for key, reference, ours in zip(raw.outputs, theirs, bound.outputs.values(), strict=True):
        for y in (ours, torch.from_numpy(reference)):
            assert_as_accurate(y, eager[key], right[key])
    assert bound.plan.bytes < 1.1 * bound.plan.live_bytes
