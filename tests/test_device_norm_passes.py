"""fuse_heads, fuse_norm and split_concat: what they take in, what they leave alone, and that the numbers stay."""

from __future__ import annotations

import pytest
import torch
from small_drafts import VOLUME, Small, check, exact, feeds, kinds

from volcast.export.device_passes.fuse_heads import fuse_heads, packed_taps
from volcast.export.device_passes.fuse_norm import fuse_norm
from volcast.export.device_passes.split_concat import split_concat
from volcast.export.draft import Draft
from volcast.export.passes.phase_conv import phase_weight
from volcast.kernels import phase_weights
from volcast.runtime.device.program import Operation


def the(draft: Draft, kind: str) -> Operation:
    (one,) = [one for one in draft.operations if one.kind == kind]
    return one


def norms(before: Draft) -> Draft:
    after = fuse_norm(before)
    check(before, after)
    assert fuse_norm(after).operations == after.operations
    return after


def heads(before: Draft) -> Draft:
    after = fuse_heads(before)
    check(before, after)
    assert fuse_heads(after).operations == after.operations
    return after


@pytest.mark.parametrize("axes", [2, 3])
def test_the_packing_of_a_phase_convolution_is_that_of_the_convolution_it_came_from(axes: int) -> None:
    weight = torch.randn(5, 3, *(3,) * axes)
    assert torch.equal(packed_taps(phase_weight(weight)), phase_weights(weight))


@pytest.mark.parametrize("axes", [2, 3])
def test_transposed_convolutions_that_double_become_phase_convolutions(axes: int) -> None:
    shape = (None, 16, *(None,) * axes)
    small = Small(x=shape)
    y = small.transposed("x", 16, 8, axes=axes)
    after = heads(small.draft(y))
    assert kinds(after) == {"upsample_convolution": 1}
    assert after.weights[the(after, "upsample_convolution").inputs[1]].shape == (2**axes, 2**axes, 16, 8)


@pytest.mark.parametrize(
    "other", [{"kernel": 2}, {"padding": 0}, {"stride": 1}, {"dilation": 3, "padding": 1}, {"output_padding": 1}, {"groups": 2}]
)  # fmt: skip
def test_other_transposed_convolutions_stay(other: dict[str, int]) -> None:
    small = Small(x=VOLUME)
    after = heads(small.draft(small.transposed("x", 16, 16, **other)))
    assert kinds(after) == {"transposed_convolution": 1}


def test_transposed_convolutions_with_channels_that_the_kernel_refuses_stay() -> None:
    small = Small(x=VOLUME)
    after = heads(small.draft(small.transposed("x", 16, 4)))
    assert kinds(after) == {"transposed_convolution": 1}


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize(("axes", "cout", "bias"), [(3, 1, True), (3, 9, False), (2, 28, True)])
def test_a_norm_and_a_convolution_to_few_channels_are_an_output_head(
    axes: int, cout: int, bias: bool, activated: bool
) -> None:
    small = Small(x=(None, 16, *(None,) * axes))
    y = small.group_norm("x")
    y = small.step("silu", y) if activated else y
    after = heads(small.draft(small.convolution(y, 16, cout, bias=bias, axes=axes)))
    assert kinds(after) == {"output_head": 1}
    assert the(after, "output_head").settings["activation"] == ("silu" if activated else "none")


@pytest.mark.parametrize("why", ["channels", "stride", "read twice", "returned", "gate read", "dilation"])
def test_norms_that_are_no_part_of_an_output_head_stay(why: str) -> None:
    small = Small(x=VOLUME)
    norm = small.group_norm("x")
    y = small.step("silu", norm)
    window = {"stride": {"stride": 2}, "dilation": {"dilation": 2, "padding": 2}}.get(why, {})
    outputs = [small.convolution(y, 16, 10 if why == "channels" else 2, **window)]
    if why == "read twice":
        outputs.append(small.convolution(y, 16, 16))
    if why in ("returned", "gate read"):
        outputs.append(y if why == "returned" else small.step("exp", norm))
    after = heads(small.draft(*outputs))
    assert kinds(after)["group_norm"] == 1 and kinds(after)["output_head"] == 0


@pytest.mark.parametrize(("axes", "cin", "bias"), [(3, 1, True), (3, 8, False), (2, 16, True)])
def test_a_convolution_from_few_channels_is_an_input_head(axes: int, cin: int, bias: bool) -> None:
    small = Small(x=(None, cin, *(None,) * axes))
    after = heads(small.draft(small.convolution("x", cin, 16, bias=bias, axes=axes)))
    assert kinds(after) == {"input_head": 1}


@pytest.mark.parametrize(
    ("cin", "window"), [(16, {}), (4, {"stride": 2}), (4, {"kernel": 1}), (4, {"groups": 2})]
)
def test_other_convolutions_are_no_input_heads(cin: int, window: dict[str, int]) -> None:
    small = Small(x=(None, cin, None, None, None))
    after = heads(small.draft(small.convolution("x", cin, 16, **window)))
    assert kinds(after) == {"convolution": 1}


def test_a_norm_takes_the_silu_that_alone_reads_it() -> None:
    small = Small(x=VOLUME)
    after = norms(small.draft(small.step("silu", small.group_norm("x"))))
    assert kinds(after) == {"group_norm": 1}
    assert the(after, "group_norm").settings["activation"] == "silu"


@pytest.mark.parametrize("why", ["returned", "read", "gelu", "layer_norm"])
def test_an_activation_that_is_not_the_norm_s_stays(why: str) -> None:
    small = Small(x=(None, None, 16) if why == "layer_norm" else VOLUME)
    y = small.layer_norm("x") if why == "layer_norm" else small.group_norm("x")
    outputs = [small.step("gelu" if why == "gelu" else "silu", y)]
    outputs += [y] if why == "returned" else [small.step("exp", y)] if why == "read" else []
    after = norms(small.draft(*outputs))
    assert kinds(after)["pointwise"] == len(small.operations) - 1
    assert after.producer[outputs[0]].kind == "pointwise"


def test_a_norm_takes_the_time_embedding_as_its_shift() -> None:
    small = Small(x=VOLUME, row=(None, 40))
    y = small.add(small.columns("row", 8, 24), small.convolution("x", 16, 16))
    after = norms(small.draft(small.group_norm(y)))
    assert kinds(after) == {"columns": 1, "convolution": 1, "group_norm": 1}
    assert the(after, "group_norm").inputs[3] == the(after, "columns").outputs[0]


def test_a_sum_with_a_shift_alone_that_others_read_stays() -> None:
    small = Small(x=VOLUME, row=(None, 16))
    y = small.add(small.convolution("x", 16, 16), "row")
    after = norms(small.draft(small.group_norm(y), y))
    assert kinds(after) == {"convolution": 1, "group_norm": 1, "pointwise": 1}


def test_a_residual_and_a_shift_are_taken_and_the_sum_is_written_for_others() -> None:
    small = Small(x=VOLUME, row=(None, 16))
    total = small.add(small.add(small.convolution("x", 16, 16), "row"), "x")
    first, second = small.group_norm(total), small.group_norm(total)
    after = norms(small.draft(first, second, small.convolution(total, 16, 16, stride=2), total))
    assert kinds(after) == {"convolution": 2, "group_norm": 2}
    writers = [one for one in after.operations if one.kind == "group_norm" and len(one.outputs) == 2]
    assert len(writers) == 1 and writers[0].outputs[1] == total
    assert "x" == writers[0].inputs[4] and "row" == writers[0].inputs[3]


def test_a_middle_sum_that_others_read_stays() -> None:
    small = Small(x=VOLUME, row=(None, 16))
    middle = small.add(small.convolution("x", 16, 16), "row")
    after = norms(small.draft(small.group_norm(small.add(middle, "x")), middle))
    assert kinds(after)["pointwise"] == 1
    assert set(the(after, "group_norm").inputs[::4]) == {middle, "x"}


def test_one_norm_takes_one_residual_and_one_shift() -> None:
    small = Small(x=VOLUME, y=VOLUME, row=(None, 32))
    total = small.add(small.add(small.convolution("x", 16, 16), "x"), "y")
    total = small.add(small.add(total, small.columns("row", 0, 16)), small.columns("row", 16, 32))
    after = norms(small.draft(small.group_norm(total)))
    assert len(the(after, "group_norm").inputs) == 4 and kinds(after)["pointwise"] == 3


def test_a_layer_norm_takes_residual_and_shift_from_any_order() -> None:
    small = Small(x=(None, None, 16), constants=(None, 16))
    product = small.linear("x")
    total = small.add("constants", small.add(product, "x"))
    after = norms(small.draft(small.layer_norm(total), small.add(total, product)))
    assert kinds(after) == {"linear": 1, "layer_norm": 1, "pointwise": 1}
    norm = the(after, "layer_norm")
    assert norm.inputs[0] == product and norm.inputs[3:] == ("constants", "x") and norm.outputs[1] == total


def test_a_layer_norm_with_a_shift_alone_writes_the_sum() -> None:
    small = Small(x=(None, None, 16), constants=(None, 16))
    total = small.add("x", "constants")
    after = norms(small.draft(small.layer_norm(total), total))
    assert kinds(after) == {"layer_norm": 1}


def test_a_norm_s_own_operand_is_never_a_slice() -> None:
    small = Small(x=(None, None, 48))
    total = small.add(small.columns("x", 0, 16), small.columns("x", 16, 32))
    after = norms(small.draft(small.layer_norm(total)))
    assert kinds(after)["pointwise"] == 1


def test_a_concatenation_that_norms_and_products_read_is_never_written() -> None:
    small = Small(x=VOLUME, skip=(None, 8, None, None, None))
    total = small.add(small.convolution("x", 16, 16), "x")
    whole = small.concat(total, "skip")
    y = small.step("silu", small.group_norm(whole, 24, 4))  # 6 channels a group: one straddles the border
    before = small.draft(
        small.convolution(y, 24, 16), small.linear(whole, 24, 16), small.convolution(total, 16, 8)
    )
    fused = norms(before)
    assert kinds(fused) == {"convolution": 3, "group_norm": 1, "concat": 1, "linear": 1}
    norm = the(fused, "group_norm")
    assert norm.inputs[5] == "skip" and norm.outputs[1] == total
    after = split_concat(fused)
    check(before, after)
    assert kinds(after) == {"convolution": 3, "group_norm": 1, "linear": 2}
    assert split_concat(after).operations == after.operations


@pytest.mark.parametrize("why", ["three", "axis", "returned", "convolution"])
def test_a_concatenation_that_is_written_anyway_stays(why: str) -> None:
    small = Small(x=VOLUME, skip=VOLUME)
    whole = small.concat("x", "skip", *["x"] * (why == "three"), axis=2 if why == "axis" else 1)
    channels = {"three": 48, "axis": 16}.get(why, 32)
    outputs = [small.group_norm(whole, channels), small.linear(whole, channels, 16)]
    outputs += (
        [whole] if why == "returned" else [small.convolution(whole, 32, 8)] if why == "convolution" else []
    )
    before = small.draft(*outputs)
    assert norms(before).operations == before.operations
    assert split_concat(before).operations == before.operations


def test_a_sum_that_the_concatenation_s_other_part_comes_from_stays() -> None:
    """The norm would have to run before what it reads."""
    small = Small(x=VOLUME)
    total = small.add(small.convolution("x", 16, 16), "x")
    whole = small.concat(total, small.convolution(total, 16, 16))
    after = norms(small.draft(small.group_norm(whole, 32)))
    assert kinds(after)["pointwise"] == 1 and the(after, "group_norm").inputs[0] == total


def test_two_norms_of_one_concatenation() -> None:
    small = Small(x=VOLUME, skip=VOLUME)
    whole = small.concat(small.add("x", "skip"), "skip")
    after = norms(small.draft(small.group_norm(whole, 32), small.group_norm(whole, 32)))
    assert kinds(after) == {"group_norm": 2}
    assert sorted(len(one.outputs) for one in after.operations) == [1, 2]


@pytest.mark.parametrize("shape", [(None, None, 16), (None, 16), VOLUME])
def test_a_product_with_a_concatenation_is_two_products(shape: tuple[int | None, ...]) -> None:
    small = Small(x=shape, y=(*shape[:-1], 8) if len(shape) < 4 else (None, 8, None, None, None))
    whole = small.concat("x", "y", axis=1 if len(shape) >= 4 else -1)
    before = small.draft(small.linear(whole, 24, 8), small.linear(whole, 24, 16, bias=False))
    after = split_concat(before)
    check(before, after)
    assert kinds(after) == {"linear": 4}


def test_the_oracle_of_these_tests_spreads_as_pytorch_does() -> None:
    small = Small(x=VOLUME, row=(None, 16))
    draft = small.draft(small.step("mul", small.add("x", "row"), small.weight(16, name="scale")))
    given = feeds(draft)
    row, scale = (
        given["row"].double()[..., None, None, None],
        draft.weights["scale"].double()[:, None, None, None],
    )
    assert torch.equal(exact(draft, given)[0], (given["x"].double() + row) * scale)
