"""cast_constants: what it casts, where, and that the numbers are those of float32 rounded once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from small_drafts import Small, feeds, kinds

from volcast.export.device_passes.cast_constants import cast_constants, float32_values
from volcast.export.draft import Draft
from volcast.export.draft_run import run_draft

HEADS, KEYS, WIDTH = 2, 5, 8
TOKENS = (None, None, HEADS * WIDTH)
EACH = HEADS * KEYS * WIDTH


def heads(small: Small, start: int) -> str:
    """`N H M D` from a range of the constants, as `prepare` packs them."""
    return small.op("reshape", small.columns("constants", start, start + EACH), sizes=[0, HEADS, KEYS, WIDTH])


def tokens(small: Small, start: int) -> str:
    turned = small.op("transpose", heads(small, start), order=[0, 2, 1, 3])
    return small.op("reshape", turned, sizes=[0, 0, HEADS * WIDTH])


def cast(before: Draft) -> Draft:
    """After the pass: in float32 the same bits, and nothing more to do."""
    after = cast_constants(before)
    given = feeds(before)
    for one, other in zip(run_draft(after, given), run_draft(before, given), strict=True):
        assert torch.equal(one, other)
    assert cast_constants(after).operations == after.operations
    return after


def casts(draft: Draft) -> list[tuple[str | None, ...]]:
    return [one.inputs for one in draft.operations if one.kind == "cast"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_and_values_take_the_tokens_type_by_one_cast(dtype: torch.dtype) -> None:
    small = Small(x=TOKENS, constants=(None, 4 * EACH))
    starts = ((0, EACH), (2 * EACH, 3 * EACH))
    pairs = [[tokens(small, start) for start in pair] for pair in starts]
    outputs = [small.op("attention", "x", *pair, heads=HEADS, scale=0.3) for pair in pairs]
    before = small.draft(*outputs)
    after = cast(before)
    assert kinds(after) == kinds(before) + Counter(cast=1)
    assert casts(after) == [("constants", "x")]

    given = feeds(before)
    given["x"] = given["x"].to(dtype)
    with pytest.raises(ValueError, match="dtype"):
        run_draft(before, given)
    for pair, result in zip(starts, run_draft(after, given), strict=True):
        q = given["x"].unflatten(2, (HEADS, WIDTH)).transpose(1, 2)
        k, v = (given["constants"].to(dtype)[:, i : i + EACH].reshape(-1, HEADS, KEYS, WIDTH) for i in pair)
        eager, exact = (
            F.scaled_dot_product_attention(*(t.to(kind) for t in (q, k, v)), scale=0.3)
            for kind in (dtype, torch.float64)
        )
        assert_as_accurate(result, *(y.transpose(1, 2).flatten(2) for y in (eager, exact)))


@pytest.mark.parametrize("kind", ["matmul", "einsum", "concat"])
def test_other_operations_of_one_type(kind: str) -> None:
    small = Small(x=(None, HEADS, KEYS, WIDTH), constants=(None, EACH))
    other = heads(small, 0)
    if kind == "matmul":
        y = small.op("matmul", "x", small.op("transpose", other, order=[0, 1, 3, 2]))
    elif kind == "einsum":
        y = small.op("einsum", "x", other, equation="nhld,nhmd->nhlm")
    else:
        y = small.op("concat", "x", other, axis=2)
    before = small.draft(y)
    after = cast(before)
    assert casts(after) == [("constants", "x")]
    given = feeds(before)
    half = {"x": given["x"].half(), "constants": given["constants"]}
    rounded = {name: value.half().float() for name, value in given.items()}
    (result,), (wanted,) = run_draft(after, half), run_draft(before, rounded)
    assert result.dtype == torch.float16
    # The same sums in float32, rounded once.
    torch.testing.assert_close(result, wanted.half(), rtol=2**-10, atol=2**-10)


def test_what_is_computed_is_cast_after_it_and_its_other_readers_stay_float32() -> None:
    small = Small(x=TOKENS, row=(None, 16), constants=(None, 16))
    sum_ = small.add("row", "constants")
    one = small.op("reshape", sum_, sizes=[0, 1, 16])
    attended = small.op("attention", "x", one, one, heads=1, scale=1.0)
    after = cast(small.draft(attended, small.linear(sum_), one))
    assert casts(after) == [(sum_, "x")]
    assert {sum_, one} < float32_values(after) and attended not in float32_values(after)


def test_what_is_of_one_type_already_and_what_spreads_stays() -> None:
    small = Small(x=TOKENS, row=(None, 16), constants=(None, 16))
    shifted = small.add("x", "row")
    together = small.concat("row", "constants")
    attended = small.op("attention", "x", shifted, shifted, heads=2, scale=1.0)
    before = small.draft(attended, small.linear(together, 32))
    assert cast(before).operations == before.operations
    assert {"row", "constants", together} < float32_values(before)


def test_a_reshape_that_reads_sizes_of_a_volume_keeps_the_type() -> None:
    small = Small(x=TOKENS, constants=(None, 16))
    sized = small.op("reshape", "constants", "x", sizes=[[1, 0], 1, -1])
    before = small.draft(small.op("attention", "x", sized, sized, heads=2, scale=1.0))
    assert sized in float32_values(before)
    assert casts(cast(before)) == [("constants", "x")]
