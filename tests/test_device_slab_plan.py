"""Decoding within a memory limit: the whole program's numbers, in no more memory than predicted."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from accuracy import assert_as_accurate
from decoder_programs import Decoder
from device_exact import exact
from device_programs import RandomProgram
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from volcast.export.to_cuda import device_draft
from volcast.runtime.artifact import read_artifact
from volcast.runtime.device.allocations import Allocations
from volcast.runtime.device.operations import dense, evaluate
from volcast.runtime.device.program import DeviceProgram, Operation
from volcast.runtime.device.slab_apply import FusedApply
from volcast.runtime.device.slab_decode import SlabDecoder
from volcast.runtime.device.slab_plan import SlabPlan, plan_slabs

ALL = 10**12


def described(inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (tuple(x.shape), x.dtype) for name, x in inputs.items()}


def run_whole(
    program: DeviceProgram, weights: dict[str, Tensor], inputs: dict[str, Tensor], define: Any = evaluate
) -> dict[str, Tensor]:
    """The program's outputs from every operation on whole values; in float64 with `define=exact`."""
    values = {**weights, **inputs}
    if define is exact:
        values = {name: x.double() for name, x in values.items()}
    for operation in program.operations:
        given = [None if name is None else values[name] for name in operation.inputs]
        values |= zip(operation.outputs, map(dense, define(operation, given)), strict=True)
    return {name: values[name] for name in program.outputs}


def smallest(
    program: DeviceProgram, weights: dict[str, Tensor], inputs: dict[str, Tensor], apply: Any = evaluate
) -> int:
    """The limit that the refusal names."""
    with pytest.raises(ValueError, match=r"\[decode\] memory_limit=1: need at least") as error:
        plan_slabs(program, weights, described(inputs), 1, apply)
    found = re.search(r"at least (\d+) bytes", str(error.value))
    assert found
    return int(found[1])


def measured(
    plan: SlabPlan, weights: dict[str, Tensor], inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """(outputs, bytes of all tensors at once)."""
    decoder = SlabDecoder(plan, weights)
    with Allocations() as allocations:
        outputs = decoder.run(inputs)
    read = [weights[name] for name in plan.program.weights()]
    return outputs, allocations.peak + sum(x.nbytes for x in (*read, *inputs.values()))


def check(
    program: DeviceProgram, weights: dict[str, Tensor], inputs: dict[str, Tensor], limit: int, exactly: bool
) -> SlabPlan:
    plan = plan_slabs(program, weights, described(inputs), limit)
    outputs, peak = measured(plan, weights, inputs)
    assert peak <= plan.peak_bytes <= limit
    if exactly:
        assert peak >= 0.85 * plan.peak_bytes
    eager, oracle = run_whole(program, weights, inputs), run_whole(program, weights, inputs, exact)
    for name in program.outputs:
        assert_as_accurate(outputs[name], eager[name], oracle[name])
    return plan


@cache
def decoder(**settings: Any) -> tuple[DeviceProgram, dict[str, Tensor]]:
    torch.manual_seed(0)
    made = Decoder((8, 16), groups=4, **settings)
    return made.program, made.weights


def latent(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"z": dense(torch.randn(shape).to(dtype))}


@pytest.mark.parametrize("how", ["nearest", "linear", "attention"])
def test_a_decoder_within_limits(how: str) -> None:
    """From everything at once to the least: less memory is more work, and never other numbers."""
    program, weights = decoder(linear=how == "linear", attention=how == "attention")
    inputs = latent(1, 4, 7, 6, 5)
    least = smallest(program, weights, inputs)
    most = check(program, weights, inputs, ALL, True)
    assert least < most.peak_bytes and all(one.height == 0 for one in most.passes)
    plans = [check(program, weights, inputs, int(least + share * (most.peak_bytes - least)), True)
             for share in (0.6, 0.3, 0.0)]  # fmt: skip
    assert any(one.height for one in plans[0].passes)
    assert plans[-1].peak_bytes == least
    assert most.milliseconds < plans[0].milliseconds < plans[-1].milliseconds


@pytest.mark.parametrize("shape", [(1, 4, 1, 3, 2), (2, 4, 3, 4, 5), (2, 4, 2, 2, 2)])
def test_few_rows_and_several_samples(shape: tuple[int, ...]) -> None:
    program, weights = decoder(attention=True)
    inputs = latent(*shape)
    check(program, weights, inputs, smallest(program, weights, inputs), False)


def test_images() -> None:
    program, weights = decoder(axes=2)
    inputs = latent(1, 4, 13, 10)
    least = smallest(program, weights, inputs)
    for limit in (least, 2 * least):
        check(program, weights, inputs, limit, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    program, weights = decoder(dtype=dtype)
    inputs = latent(1, 4, 5, 6, 4, dtype=dtype)
    check(program, weights, inputs, smallest(program, weights, inputs), True)


@cache
def oracle_and_plan() -> tuple[SlabPlan, Tensor, Tensor]:
    program, weights = decoder(linear=True)
    inputs = latent(1, 4, 5, 4, 3)
    plan = plan_slabs(program, weights, described(inputs), smallest(program, weights, inputs))
    return (
        plan,
        run_whole(program, weights, inputs)["image"],
        run_whole(program, weights, inputs, exact)["image"],
    )


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_heights(data: st.DataObject) -> None:
    """Heights that divide nothing, from one row to more than there are."""
    plan, eager, oracle = oracle_and_plan()
    heights = data.draw(st.lists(st.integers(0, 12), min_size=len(plan.passes), max_size=len(plan.passes)))
    other = replace(
        plan, passes=tuple(replace(one, height=h) for one, h in zip(plan.passes, heights, strict=True))
    )
    _, weights = decoder(linear=True)
    outputs = SlabDecoder(other, weights).run(latent(1, 4, 5, 4, 3))
    assert_as_accurate(outputs["image"], eager, oracle)


@pytest.mark.parametrize("seed", range(24))
def test_random_programs_of_all_kinds(seed: int) -> None:
    """Strides, poolings, pads, concatenations, shifts, tokens between: stored, recomputed, whole."""
    made = RandomProgram(seed, 18)
    inputs = made.data()
    program = made.program
    least = smallest(program, made.weights, inputs)
    for limit in (least, 2 * least):
        check(program, made.weights, inputs, limit, False)


def test_the_fused_forms() -> None:
    """What runs on a GPU, here interpreted where no GPU is: the same passes, the numbers of the definitions."""
    program, weights = decoder()
    inputs = latent(1, 4, 4, 3, 2)
    apply = FusedApply()
    plan = plan_slabs(program, weights, described(inputs), smallest(program, weights, inputs, apply), apply)
    assert any(one.height for one in plan.passes)
    found = SlabDecoder(plan, weights, apply).run(inputs)["image"]
    eager, oracle = (run_whole(program, weights, inputs, define)["image"] for define in (evaluate, exact))
    assert_as_accurate(found, eager, oracle)


def test_the_same_bits_every_time() -> None:
    program, weights = decoder()
    inputs = latent(1, 4, 3, 2, 2)
    least = smallest(program, weights, inputs)
    first, again = (plan_slabs(program, weights, described(inputs), least) for _ in range(2))
    assert first.passes == again.passes
    images = [SlabDecoder(plan, weights).run(inputs)["image"] for plan in (first, again)]
    assert torch.equal(*images)


def test_what_is_refused() -> None:
    program, weights = decoder()
    inputs = latent(1, 4, 6, 5, 4)
    plan = plan_slabs(program, weights, described(inputs), ALL)
    with pytest.raises(ValueError, match=r"\[decode\] z is missing"):
        plan_slabs(program, weights, {}, ALL)
    with pytest.raises(
        ValueError, match=r"\[decode\] z has shape \(1, 4, 5, 5, 4\) .*: need \(1, 4, 6, 5, 4\)"
    ):
        SlabDecoder(plan, weights).run(latent(1, 4, 5, 5, 4))


def test_allocations_are_those_of_the_allocator() -> None:
    """Against PyTorch's own record of its allocator, where operations have no scratch of their own."""
    from torch.profiler import ProfilerActivity, profile

    x = torch.randn(100, 100)

    def work() -> Tensor:
        y = (x + 1).t()
        z = torch.cat([y, y * 2])
        del y
        return (z.relu_() - 3)[:5]

    work()
    with Allocations() as allocations:
        kept = work()
        assert allocations.live == 200 * 100 * 4
        del kept
        assert allocations.live == 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert allocations.peak <= live.max() <= allocations.peak + 1024  # a scalar 3 is a tensor for a moment


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_bundled_autoencoder(default_artifact_folder: Path, share: float) -> None:
    """A MONAI decoder, as the device passes leave it, against ONNX Runtime on the whole volume."""
    spec = read_artifact(default_artifact_folder)
    path = default_artifact_folder / spec.programs["decode"].file
    draft = device_draft(path)
    program, weights = draft.program(), dict(draft.weights)
    sizes = {axis.name: axis.multiple * 2 for axis in spec.axes} | {"batch": 1}
    (z,) = spec.programs["decode"].inputs
    torch.manual_seed(2)
    inputs = {z.name: dense(torch.randn([sizes.get(size, size) for size in z.shape]))}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {z.name: inputs[z.name].numpy()})
    least = smallest(program, weights, inputs)
    most = plan_slabs(program, weights, described(inputs), ALL).peak_bytes
    plan = plan_slabs(program, weights, described(inputs), int(least + share * (most - least)))
    outputs, peak = measured(plan, weights, inputs)
    assert 0.85 * plan.peak_bytes <= peak <= plan.peak_bytes < most
    for name, one in zip(program.outputs, wanted, strict=True):
        assert np.linalg.norm(outputs[name].numpy() - one) <= 1e-5 * np.linalg.norm(one)


@pytest.mark.slow
def test_maisi_at_512() -> None:
    """AutoencoderKlMaisi's decoder to 512^3 in 80 GB, where whole values have 2^34 elements: every operation stays
    below 2^31, and the run's allocations (on `meta`, all slabs of it) are the predicted ones."""
    made = Decoder((64, 128, 256), linear=True, dtype=torch.float16, device="meta")
    inputs = {"z": dense(torch.empty(1, 4, 128, 128, 128, dtype=torch.float16, device="meta"))}
    apply = FusedApply()
    plan = plan_slabs(made.program, made.weights, described(inputs), 80 * 10**9, apply)
    assert max(torch.Size(shape).numel() for shape in plan.shapes.values()) == 2**34
    largest = 0

    def watched(operation: Operation, given: Any) -> list[Tensor]:
        nonlocal largest
        results = apply(operation, given)
        largest = max([largest, *(x.numel() for x in (*given, *results) if x is not None)])
        return results

    decoder = SlabDecoder(plan, made.weights, watched)
    with Allocations() as allocations:
        (image,) = decoder.run(inputs).values()
    assert image.shape == (1, 1, 512, 512, 512)
    assert largest < 2**31
    constant = sum(x.nbytes for x in (*made.weights.values(), *inputs.values()))
    assert 0.99 * plan.peak_bytes <= allocations.peak + constant <= plan.peak_bytes <= 80 * 10**9
    assert plan.milliseconds < 1.3 * plan.whole_milliseconds
