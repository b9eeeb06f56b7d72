"""The order of operations: against every order that runs, against closed forms, and bit for bit against the given one."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch
from device_programs import RandomProgram
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from volcast.runtime.device import executor as executors
from volcast.runtime.device.executor import Executor
from volcast.runtime.device.memory import ALIGNMENT, Spec, aligned, plan, shapes, size_of
from volcast.runtime.device.order import Orders, plan_order
from volcast.runtime.device.program import VIEWS, DeviceProgram, Operation

CPU = torch.device("cpu")
NORM = {"groups": 32, "eps": 1e-6, "activation": "silu"}
PADDED = {"stride": [1] * 3, "padding": [1] * 3, "dilation": [1] * 3, "groups": 1}


def reordered(program: DeviceProgram, order: list[int]) -> DeviceProgram:
    return program.model_copy(update={"operations": tuple(program.operations[index] for index in order)})


def runs(program: DeviceProgram) -> bool:
    """Every value is made before it is read."""
    there = set(program.inputs) | program.weights()
    for one in program.operations:
        if not there.issuperset(name for name in one.inputs if name is not None):
            return False
        there |= set(one.outputs)
    return True


def least(program: DeviceProgram, specs: Mapping[str, Spec]) -> int:
    """The fewest bytes alive at once over all orders. What is alive depends on what has run, not on its order."""
    judge, count = Orders(program, specs, frozenset()), len(program.operations)
    made = {name for one in program.operations for name in one.outputs}
    needs = [made.intersection(filter(None, one.inputs)) for one in program.operations]
    best: dict[frozenset[int], tuple[int, list[int]]] = {frozenset(): (0, [])}
    for place in range(count):
        longer: dict[frozenset[int], tuple[int, list[int]]] = {}
        for done, (peak, order) in best.items():
            there = {name for index in done for name in program.operations[index].outputs}
            for index in set(range(count)) - done:
                if needs[index] <= there:
                    rest = [other for other in range(count) if other not in done and other != index]
                    now = max(peak, judge.profile([*order, index, *rest])[place])
                    key = done | {index}
                    if key not in longer or now < longer[key][0]:
                        longer[key] = now, [*order, index]
        best = longer
    ((peak, _),) = best.values()
    return max(peak, inputs_bytes(program, specs))


def inputs_bytes(program: DeviceProgram, specs: Mapping[str, Spec]) -> int:
    return sum(aligned(size_of(specs[name])) for name in program.inputs)


def tail(half: int, sides: tuple[int, ...]) -> tuple[DeviceProgram, dict[str, Spec]]:
    """The last level of AutoencoderKL's decoder, from 2 * `half` channels to `half`, as the passes leave it; shapes alone."""
    cin, cout = 2 * half, half
    weights = {
        "up": (8, 8, cin, cin), "w1": (cout, cin, 3, 3, 3), "w2": (cout, cout, 3, 3, 3), "w3": (1, cout, 3, 3, 3),
        "skip": (cin, cout), "in": (cin,), "out": (cout,), "one": (1,),
    }  # fmt: skip
    operations = (
        Operation(kind="upsample_convolution", inputs=("z", "up"), outputs=("x",)),
        Operation(kind="group_norm", inputs=("x", "in", "in"), outputs=("a",), settings=NORM),
        Operation(kind="convolution", inputs=("a", "w1"), outputs=("b",), settings=PADDED),
        Operation(kind="group_norm", inputs=("b", "out", "out"), outputs=("c",), settings=NORM),
        Operation(kind="convolution", inputs=("c", "w2"), outputs=("d",), settings=PADDED),
        Operation(kind="linear", inputs=("x", "skip"), outputs=("s",)),
        Operation(kind="group_norm", inputs=("s", "out", "out", None, "d"), outputs=("e", "h"), settings=NORM),
        Operation(kind="convolution", inputs=("e", "w2"), outputs=("f",), settings=PADDED),
        Operation(
            kind="pointwise", inputs=("f", "h"), outputs=("g",),
            settings={"program": '[["add",0,1]]', "results": [2]},
        ),
        Operation(kind="output_head", inputs=("g", "out", "out", "w3", "one"), outputs=("image",), settings=NORM),
    )  # fmt: skip
    program = DeviceProgram(inputs=("z",), outputs=("image",), operations=operations)
    known = {
        name: torch.empty(shape, dtype=torch.float16 if len(shape) > 1 else torch.float32, device="meta")
        for name, shape in weights.items()
    }
    return program, shapes(program, known, {"z": ((1, cin, *sides), torch.float16)})


def test_a_shortcut_s_product_goes_before_the_norm_that_then_overwrites_its_input() -> None:
    """BrainLDM's decode to 160x224x160. While the first convolution runs: norm, convolution and shortcut, 2 + 1 + 1
    times 64 channels; with the shortcut's input in its place, one more."""
    program, specs = tail(64, (80, 112, 80))
    ordered, found = plan_order(program, specs)
    level = 2 * 64 * 160 * 224 * 160
    assert (plan(program, specs).bytes, found.bytes) == (5 * level, 4 * level)
    assert found.live_bytes == least(program, specs)
    names = [one.outputs[0] for one in ordered.operations]
    assert names == ["x", "s", "a", "b", "c", "d", "e", "f", "g", "image"]
    assert found.in_place["a"] == "x"


def linear(x: str, y: str, cin: int, cout: int) -> Operation:
    return Operation(kind="linear", inputs=(x, f"w{cin}.{cout}"), outputs=(y,))


def test_of_two_branches_the_one_that_needs_more_runs_first() -> None:
    """x -> 8 -> 1 and x -> 4 -> 3, in units of ALIGNMENT: 3 waits while 8 is made (1 + 8 + 3), or 1 while 4 is."""
    operations = (
        linear("x", "b", 32, 128), linear("b", "bb", 128, 96), linear("x", "a", 32, 256), linear("a", "aa", 256, 32),
        Operation(kind="concat", inputs=("aa", "bb"), outputs=("y",), settings={"axis": -1}),
    )  # fmt: skip
    program = DeviceProgram(inputs=("x",), outputs=("y",), operations=operations)
    weights = {name: torch.empty(*map(int, name[1:].split("."))) for name in program.weights()}
    specs = shapes(program, weights, {"x": ((2, 1, 32), torch.float32)})
    ordered, found = plan_order(program, specs)
    assert (plan(program, specs).bytes, found.bytes) == (12 * ALIGNMENT, 10 * ALIGNMENT)
    assert [one.outputs[0] for one in ordered.operations] == ["a", "aa", "b", "bb", "y"]
    assert least(program, specs) == 10 * ALIGNMENT


@given(st.integers(0, 2**32), st.integers(1, 25), st.sets(st.sampled_from(["x", "image", "row"])))
@example(330, 25, set())  # less is alive at once in the order that is found, and its arena is larger
@example(0, 12, set())  # as much is alive, less often
@settings(max_examples=60, deadline=None)
def test_an_order_runs_and_never_takes_more(seed: int, operations: int, kept: set[str]) -> None:
    made, keep = RandomProgram(seed, operations), frozenset(kept)
    specs = shapes(made.program, made.weights, made.inputs)
    ordered, found = plan_order(made.program, specs, keep)
    before = plan(made.program, specs, keep)
    assert sorted(map(str, ordered.operations)) == sorted(map(str, made.program.operations)) and runs(ordered)
    assert found == plan(ordered, specs, keep)
    assert found.bytes < before.bytes or (ordered, found) == (made.program, before)
    assert plan_order(made.program, specs, keep) == plan_order(ordered, specs, keep) == (ordered, found)


@given(st.integers(0, 2**32), st.integers(1, 20), st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_order_is_judged_by_what_the_plan_has_alive(seed: int, operations: int, keeps: bool) -> None:
    program, keep = (made := RandomProgram(seed, operations)).program, frozenset({"x"} if keeps else ())
    specs = shapes(program, made.weights, made.inputs)
    left, order, there = (
        list(range(len(program.operations))),
        list[int](),
        set(program.inputs) | program.weights(),
    )
    draw = random.Random(seed)
    while left:  # any order that runs
        ready = [i for i in left if there.issuperset(filter(None, program.operations[i].inputs))]
        order.append(draw.choice(ready))
        left.remove(order[-1])
        there |= set(program.operations[order[-1]].outputs)
    alive = Orders(program, specs, keep).profile(order)
    wanted = plan(reordered(program, order), specs, keep).live_bytes
    assert max(inputs_bytes(program, specs), *alive) == wanted


def test_orders_are_mostly_the_best() -> None:
    """28 of these 30 were when written, and 1.1 times the least was the most; of the orders as given 9, and 1.38 times."""
    ratios = []
    for seed in range(30):
        made = RandomProgram(seed, 10)
        specs = shapes(made.program, made.weights, made.inputs)
        judge, best = Orders(made.program, specs, frozenset()), least(made.program, specs)
        found = max(inputs_bytes(made.program, specs), *judge.profile(judge.best()))
        assert found >= best
        ratios.append(found / best)
    assert sum(ratio == 1 for ratio in ratios) >= 26 and max(ratios) < 1.15


def test_the_bits_are_those_of_the_given_order(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = 0
    for seed in range(12):
        made = RandomProgram(seed, 20)
        data = made.data()
        ours = results(made, data)
        with monkeypatch.context() as patch:
            patch.setattr(
                executors, "plan_order", lambda program, specs, keep: (program, plan(program, specs, keep))
            )
            theirs = results(made, data)
        assert theirs.program == made.program
        moved += ours.program != theirs.program
        for name, y in ours.outputs.items():
            assert torch.equal(y, theirs.outputs[name])
    assert moved > 6


def results(made: RandomProgram, data: Mapping[str, Tensor]) -> Executor:
    bound = Executor(made.program, made.weights, made.inputs, CPU)
    bound.arena.fill_(255)
    for name, x in data.items():
        bound.inputs[name].copy_(x)
    bound.run()
    return bound


def test_views_and_what_gives_sizes_come_before_their_readers() -> None:
    """Over many programs, some views were moved."""
    seen = 0
    for seed in range(20):
        made = RandomProgram(seed, 25)
        ordered, _ = plan_order(made.program, shapes(made.program, made.weights, made.inputs))
        assert runs(ordered)
        pairs = zip(ordered.operations, made.program.operations, strict=True)
        seen += any(one != other and one.kind in VIEWS for one, other in pairs)
    assert seen > 5
