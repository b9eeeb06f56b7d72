"""fold_bias: where biases go, where they stay, and that the numbers stay."""

from __future__ import annotations

import pytest
import torch
from small_drafts import VOLUME, Small, check, kinds

from volcast.export.device_passes.fold_bias import fold_bias
from volcast.export.device_passes.fuse_heads import fuse_heads
from volcast.export.device_passes.fuse_norm import fuse_norm
from volcast.export.device_passes.fuse_pointwise import fuse_pointwise
from volcast.export.device_passes.split_concat import split_concat
from volcast.export.draft import Draft

TOKENS = (None, None, 16)


def folded(before: Draft) -> Draft:
    after = fold_bias(split_concat(fuse_norm(fuse_heads(before))))
    check(before, after)
    again = fold_bias(after)
    assert again.operations == after.operations and again.offsets == after.offsets
    return after


def biases(draft: Draft) -> int:
    """How many convolutions and products have a bias."""
    kinds = ("convolution", "transposed_convolution", "linear", "upsample_convolution")
    return sum(
        one.kind in kinds and len(one.inputs) > 2 and one.inputs[2] is not None for one in draft.operations
    )


@pytest.mark.parametrize("kind", ["convolution", "linear", "upsample_convolution", "transposed_convolution"])
def test_without_a_shift_a_bias_becomes_one(kind: str) -> None:
    small = Small(x=VOLUME)
    make = {"convolution": small.convolution, "linear": small.linear}.get(kind, small.transposed)
    window = {"padding": 0} if kind == "transposed_convolution" else {}
    made = make("x", 16, 16, **window)
    after = folded(small.draft(small.group_norm(made)))
    assert kinds(after) == {kind: 1, "group_norm": 1} and biases(after) == 0
    name = after.operations[1].inputs[3]
    assert torch.equal(after.weights[name], small.weights[small.operations[0].inputs[2]])


@pytest.mark.parametrize("silu", [False, True])
def test_a_bias_goes_to_the_columns_of_the_row_that_the_norm_reads(silu: bool) -> None:
    small = Small(x=VOLUME, row=(None, 48))
    y = "x"
    for start in (0, 32):
        y = small.add(small.convolution(y, 16, 16), small.columns("row", start, start + 16))
        y = small.group_norm(y)
        y = small.step("silu", y) if silu else y
    after = folded(small.draft(y))
    assert kinds(after) == {"columns": 2, "convolution": 2, "group_norm": 2} and biases(after) == 0
    first, second = (small.weights[one.inputs[2]] for one in small.operations if one.kind == "convolution")
    assert after.offsets == {"row": "row.offset"}
    assert torch.equal(after.weights["row.offset"], torch.cat([first, torch.zeros(16), second]))


def test_a_norm_s_constant_shift_grows() -> None:
    small = Small(x=VOLUME)
    total = small.add(small.convolution("x", 16, 16), small.weight(16))
    after = folded(small.draft(small.group_norm(total)))
    assert kinds(after) == {"convolution": 1, "group_norm": 1} and biases(after) == 0


@pytest.mark.parametrize("why", ["two norms", "overlap", "returned", "read", "free width"])
def test_columns_that_are_not_one_norm_s_alone_take_no_bias(why: str) -> None:
    small = Small(x=VOLUME, row=(None, None if why == "free width" else 32))
    part = small.columns("row", 0, 16)
    outputs = [small.group_norm(small.add(small.convolution("x", 16, 16), part))]
    if why == "two norms":
        outputs.append(small.group_norm(small.add(small.convolution("x", 16, 16), part)))
    elif why == "overlap":
        outputs.append(small.columns("row", 8, 24))
    elif why == "returned":
        outputs.append(part)
    elif why == "read":
        outputs.append(small.linear("row", 32, 8))
    after = folded(small.draft(*outputs))
    assert not after.offsets and biases(after) >= (2 if why == "two norms" else 1)


def test_a_shift_that_the_program_computes_takes_the_bias_in_its_product() -> None:
    small = Small(x=VOLUME, row=(None, 16))
    wide = small.linear("row", 16, 32)
    outputs = [
        small.group_norm(small.add(small.convolution("x", 16, 16), small.columns(wide, start, start + 16)))
        for start in (0, 16)
    ]
    after = folded(small.draft(*outputs))
    assert biases(after) == 1 and not after.offsets


def test_a_bias_that_a_residual_takes_along_folds_too() -> None:
    """Both convolutions of a residual block whose sum others read."""
    small = Small(x=VOLUME)
    total = small.add(small.convolution("x", 16, 16), small.linear("x"))
    after = folded(small.draft(small.group_norm(total), total))
    assert kinds(after) == {"convolution": 1, "linear": 1, "group_norm": 1} and biases(after) == 0


def test_a_bias_folds_into_all_norms_that_read_the_output() -> None:
    """An upsampled volume that the next norm and, as a residual, the one after it read."""
    small = Small(x=VOLUME)
    up = small.transposed("x", 16, 16)
    y = small.step("silu", small.group_norm(up))
    after = folded(small.draft(small.group_norm(small.add(small.convolution(y, 16, 16), up))))
    assert biases(after) == 0 and kinds(after) == {
        "upsample_convolution": 1,
        "group_norm": 2,
        "convolution": 1,
    }


def test_a_bias_passes_through_a_sum_and_a_view_into_the_next_product() -> None:
    small = Small(x=VOLUME)
    tokens = small.op("tokens", "x")
    volume = small.op("volume", small.add(small.linear(tokens), tokens), "x")
    after = folded(small.draft(small.linear(volume)))
    assert biases(after) == 1 and len(after.operations[-1].inputs) == 3


def test_a_bias_passes_through_the_product_that_adds_to_it() -> None:
    """A split concatenation's first product, then a norm."""
    small = Small(x=VOLUME, y=VOLUME)
    after = folded(small.draft(small.group_norm(small.linear(small.concat("x", "y"), 32, 16))))
    assert kinds(after) == {"linear": 2, "group_norm": 1} and biases(after) == 0


def test_a_sum_of_a_value_with_itself_counts_twice() -> None:
    small = Small(t=TOKENS)
    product = small.linear("t")
    after = folded(small.draft(small.linear(small.add(product, product))))
    assert biases(after) == 1


def test_a_bias_passes_through_columns() -> None:
    small = Small(t=TOKENS)
    wide = small.linear("t", 16, 32)
    outputs = [small.linear(small.columns(wide, start, start + 16)) for start in (0, 16)]
    after = folded(small.draft(*outputs))
    assert biases(after) == 2


@pytest.mark.parametrize(
    "why", ["convolution", "returned", "second", "silu", "layer_norm", "no bias", "sum read"]
)
def test_where_a_reader_can_take_no_bias_it_stays(why: str) -> None:
    small = Small(x=VOLUME, t=TOKENS)
    if why == "layer_norm":  # it would have to write the sum
        outputs = [small.layer_norm(small.linear("t"))]
    else:
        made = small.convolution("x", 16, 16)
        outputs = [
            small.group_norm(small.concat("x", made), 32) if why == "second" else small.group_norm(made)
        ]
        if why == "convolution":
            outputs.append(small.convolution(made, 16, 16, bias=False))
        elif why == "returned":
            outputs.append(made)
        elif why == "silu":
            outputs.append(small.step("silu", made))
        elif why == "no bias":
            outputs.append(small.linear(made, bias=False))
        elif why == "sum read":
            outputs.append(small.add(made, "x"))
    after = folded(small.draft(*outputs))
    assert biases(after) == 1 and not after.offsets


def test_a_layer_norm_that_writes_its_sum_takes_the_bias() -> None:
    small = Small(t=TOKENS, constants=(None, 16))
    total = small.add(small.add(small.linear("t"), "t"), "constants")
    after = folded(small.draft(small.layer_norm(total), total))
    assert biases(after) == 0 and set(after.offsets) == {"constants"}


def test_offsets_of_before_are_kept() -> None:
    small = Small(x=VOLUME, row=(None, 16))
    before = small.draft(small.group_norm(small.add(small.convolution("x", 16, 16), "row")))
    once = folded(before)
    bias = torch.full((16,), 2.0)
    one = next(one for one in once.operations if one.kind == "convolution")
    more = one.model_copy(update={"inputs": (*one.inputs, "again")})
    twice = once.edited([more if other == one else other for other in once.operations], {"again": bias})
    after = fold_bias(twice)
    assert torch.allclose(after.weights["row.offset"], once.weights["row.offset"] + bias, rtol=2**-23)


def test_the_bias_of_a_convolution_along_one_axis_is_not_of_the_last_axis() -> None:
    small = Small(x=(None, 16, 16))
    made = small.convolution("x", 16, 16, axes=1)
    before = small.draft(small.linear(small.add(made, "x")))
    assert folded(before).operations == before.operations
    assert biases(fuse_pointwise(before)) == 2
    check(before, fuse_pointwise(before))
