"""fuse_pointwise: what becomes one launch, what stays apart, and that the numbers stay."""

from __future__ import annotations

import json

import pytest
from small_drafts import VOLUME, Small, check, kinds

from volcast.export.device_passes.fuse_pointwise import MOST_INPUTS, MOST_STEPS, fuse_pointwise
from volcast.export.draft import Draft
from volcast.runtime.device.program import Operation

TOKENS = (None, None, 16)


def fused(before: Draft) -> Draft:
    after = fuse_pointwise(before)
    check(before, after)
    assert fuse_pointwise(after).operations == after.operations
    return after


def launches(draft: Draft) -> list[Operation]:
    return [one for one in draft.operations if one.kind == "pointwise"]


def steps(one: Operation) -> list[str]:
    return [step[0] for step in json.loads(one.settings["program"])]


@pytest.mark.parametrize("shape", [VOLUME, TOKENS, (None, 16)])
def test_a_chain_with_spread_operands_is_one_launch(shape: tuple[int | None, ...]) -> None:
    small = Small(x=shape, row=(None, 16))
    y = small.step("mul", small.add("x", "row"), small.weight(16))
    y = small.step("leaky_relu", y, numbers=(0.1,))
    y = small.step("clamp", small.step("sub", y, "x"), numbers=(None, 2.0))
    after = fused(small.draft(y))
    assert [steps(one) for one in after.operations] == [["add", "mul", "leaky_relu", "sub", "clamp"]]
    assert after.operations[0].inputs[:2] == ("x", "row") and len(after.operations[0].inputs) == 3


def test_constants_keep_their_registers() -> None:
    small = Small(x=VOLUME)
    program = json.dumps([["constant", 2.0], ["div", 0, 1], ["constant", 3.0], ["mul", 3, 2]])
    half = small.op("pointwise", "x", program=program, results=[4])
    after = fused(small.draft(small.op("pointwise", half, "x", program=program.replace("0, 1", "0, 2").replace(
        "[\"constant\", 2.0]", "[\"sub\", 0, 1]").replace("3, 2", "4, 3"), results=[5])))  # fmt: skip
    assert len(after.operations) == 1 and len(steps(after.operations[0])) == 8


def test_a_diamond_is_one_launch_and_a_value_that_is_read_elsewhere_a_second_result() -> None:
    small = Small(x=VOLUME)
    middle = small.step("exp", small.step("neg", "x"))
    y = small.step("mul", small.step("sin", middle), small.step("cos", middle))
    after = fused(small.draft(y, small.convolution(middle, 16, 16, bias=False)))
    assert kinds(after) == {"pointwise": 1, "convolution": 1}
    assert set(launches(after)[0].outputs) == {middle, y}
    assert sorted(steps(launches(after)[0])) == ["cos", "exp", "mul", "neg", "sin"]


def test_a_middle_value_that_is_returned_stays_a_result() -> None:
    small = Small(x=VOLUME)
    middle = small.step("exp", small.step("neg", "x"))
    after = fused(small.draft(middle, small.step("sin", middle)))
    assert len(after.operations) == 1 and len(after.operations[0].outputs) == 2


def test_what_another_operation_lies_between_stays_apart() -> None:
    small = Small(x=VOLUME)
    gate = small.step("sigmoid", "x")
    y = small.step("mul", gate, small.convolution(gate, 16, 16, bias=False))
    after = fused(small.draft(y))
    assert [one.kind for one in after.operations] == ["pointwise", "convolution", "pointwise"]


def test_a_vector_s_operations_stay_apart_from_a_volume_s() -> None:
    small = Small(x=VOLUME, row=(None, 16))
    after = fused(small.draft(small.add("x", small.step("silu", "row"))))
    assert len(launches(after)) == 2


def test_inputs_and_steps_stay_within_the_contract() -> None:
    inputs = {f"x{i}": VOLUME for i in range(MOST_INPUTS + 3)}
    small = Small(**inputs)
    y = "x0"
    for name in list(inputs)[1:]:
        y = small.add(y, name)
    z = "x0"
    for _ in range(MOST_STEPS + 5):
        z = small.step("sin", z)
    after = fused(small.draft(y, z))
    assert all(len(one.inputs) <= MOST_INPUTS and len(steps(one)) <= MOST_STEPS for one in after.operations)
    assert len(after.operations) == 4


def test_results_stay_within_the_contract() -> None:
    small = Small(x=VOLUME)
    y, outputs = "x", list[str]()
    for _ in range(7):
        y = small.step("sin", y)
        outputs.append(y)
    after = fused(small.draft(*outputs))
    assert [len(one.outputs) for one in after.operations] == [4, 3]


@pytest.mark.parametrize("kind", ["convolution", "transposed_convolution", "linear"])
def test_a_bias_is_added_by_the_launch_that_alone_reads_the_output(kind: str) -> None:
    small = Small(x=VOLUME)
    made = {"convolution": small.convolution, "linear": small.linear}.get(kind)
    y = made("x", 16, 16) if made is not None else small.transposed("x", 16, 16, kernel=3, stride=1)
    after = fused(small.draft(small.add(y, "x")))
    assert kinds(after) == {kind: 1, "pointwise": 1}
    assert len(after.operations[0].inputs) == 2 and steps(after.operations[1]) == ["add", "add"]


def test_the_biases_of_two_convolutions() -> None:
    small = Small(x=VOLUME)
    y = small.step("mul", small.convolution("x", 16, 16), small.convolution("x", 16, 16))
    after = fused(small.draft(small.step("silu", y)))
    assert kinds(after) == {"convolution": 2, "pointwise": 1}
    assert all(len(one.inputs) == 2 for one in after.operations if one.kind == "convolution")


@pytest.mark.parametrize("why", ["read", "returned", "vector", "columns"])
def test_other_biases_stay(why: str) -> None:
    small = Small(x=VOLUME, row=(None, 16))
    if why == "vector":
        outputs = [small.add("x", small.linear("row"))]
    elif why == "columns":
        wide = small.linear("x", 16, 32)
        outputs = [small.step("mul", small.columns(wide, 0, 16), small.columns(wide, 16, 32))]
    else:
        made = small.convolution("x", 16, 16)
        outputs = [
            small.step("silu", made),
            small.convolution(made, 16, 8, bias=False) if why == "read" else made,
        ]
    after = fused(small.draft(*outputs))
    (source,) = [
        one for one in after.operations if one.kind in ("convolution", "linear") and len(one.inputs) > 2
    ]
    assert source.kind == ("linear" if why in ("vector", "columns") else "convolution")


def test_a_sum_with_a_product_is_its_residual() -> None:
    small = Small(t=TOKENS, u=TOKENS)
    after = fused(small.draft(small.add("t", small.linear("u", bias=False))))
    assert kinds(after) == {"linear": 1} and after.operations[0].inputs[2:] == (None, "t")


@pytest.mark.parametrize("why", ["bias", "read", "columns", "vector", "itself"])
def test_other_sums_are_no_residuals(why: str) -> None:
    small = Small(t=TOKENS, u=TOKENS, wide=(None, None, 32), row=(None, 16))
    product = small.linear("u", bias=why == "bias")
    other = {"columns": "", "vector": "row", "itself": product}.get(why, "t")
    outputs = [small.add(product, other or small.columns("wide", 8, 24))]
    outputs += [small.layer_norm(product)] if why == "read" else []
    after = fused(small.draft(*outputs))
    assert kinds(after)["pointwise"] == 1 and kinds(after)["linear"] == 1
