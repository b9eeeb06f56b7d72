"""The plan of the arena, against brute force and against programs whose best plan is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from device_programs import RandomProgram
from hypothesis import given, settings
from hypothesis import strategies as st

from volcast.runtime.device import memory
from volcast.runtime.device.memory import ALIGNMENT, Buffer, MemoryPlan, live_bytes, pack, plan, shapes
from volcast.runtime.device.operations import dense
from volcast.runtime.device.program import KINDS, DeviceProgram, Operation


def planned(made: RandomProgram, keep: frozenset[str] = frozenset()) -> MemoryPlan:
    return plan(made.program, shapes(made.program, made.weights, made.inputs), keep)


@given(st.integers(0, 2**32), st.integers(1, 25), st.sets(st.sampled_from(["x", "image", "row"])))
@settings(max_examples=60, deadline=None)
def test_no_two_values_that_are_alive_share_a_byte(seed: int, operations: int, kept: set[str]) -> None:
    made = RandomProgram(seed, operations)
    program, keep = made.program, frozenset(kept)
    found = planned(made, keep)
    # Every value's bytes, views by following their first inputs: written from the contract, not from the plan's code.
    within: dict[str, str] = {name: name for name in program.inputs}
    sizes_only = {"cast", "reshape", "resize", "columns", "tokens", "volume"}
    reads: list[set[str]] = []
    writes: list[set[str]] = []
    for operation in program.operations:
        is_view = (
            operation.kind in ("columns", "tokens", "volume") and operation.outputs[0] not in program.outputs
        )
        inputs = operation.inputs[:1] if operation.kind in sizes_only else operation.inputs
        if is_view:
            assert operation.inputs[0] is not None
            within[operation.outputs[0]] = within.get(operation.inputs[0], operation.inputs[0])
            assert found.views[operation.outputs[0]] == within[operation.outputs[0]]
            reads.append(set())
            writes.append(set())
        else:
            within |= {name: name for name in operation.outputs}
            reads.append({within[name] for name in inputs if name in within})
            writes.append(set(operation.outputs))
    owned = {name for name, base in within.items() if name == base}
    assert found.offsets.keys() == owned
    size = {name: made.values[name].numel() * made.values[name].itemsize for name in owned}
    forever = keep | set(program.outputs)
    available = set(program.inputs)
    for time in range(-1, len(program.operations)):
        if time >= 0:
            available |= writes[time]
        later = forever.union(*reads[time + 1 :]) if time + 1 < len(reads) else forever
        now = later & available
        if time >= 0:
            now |= reads[time] | writes[time]
        for a, b in itertools.combinations(sorted(now), 2):
            apart = (
                found.offsets[a] + size[a] <= found.offsets[b]
                or found.offsets[b] + size[b] <= found.offsets[a]
            )
            if not apart:
                new, old = (a, b) if a in writes[time] else (b, a)
                assert time >= 0 and new in writes[time] and old in reads[time] - later, (a, b, time)
                taken = found.in_place[new]
                assert within[taken] == old and size[old] == size[new]
                assert program.operations[time].kind in ("pointwise", "linear", "layer_norm", "group_norm")
    assert all(offset % ALIGNMENT == 0 for offset in found.offsets.values())
    assert all(found.offsets[name] + size[name] <= found.bytes for name in owned)
    assert found == planned(made, keep)


def test_random_programs_have_all_kinds() -> None:
    seen = {operation.kind for seed in range(60) for operation in RandomProgram(seed, 25).program.operations}
    assert seen == KINDS


@st.composite
def lives(draw: st.DrawFn) -> list[Buffer]:
    count = draw(st.integers(1, 24))
    spans = [sorted(draw(st.tuples(st.integers(0, 20), st.integers(0, 20)))) for _ in range(count)]
    sizes = [draw(st.integers(1, 16)) * ALIGNMENT for _ in range(count)]
    return [
        Buffer(name=str(i), bytes=size, start=start, end=end)
        for i, (size, (start, end)) in enumerate(zip(sizes, spans, strict=True))
    ]


@given(lives())
@settings(deadline=None)
def test_a_packing_holds_what_lives_at_once(buffers: list[Buffer]) -> None:
    size, offsets = pack(buffers)
    most = max(sum(b.bytes for b in buffers if b.start <= time <= b.end) for time in range(21))
    assert live_bytes(buffers) == most <= size <= sum(b.bytes for b in buffers)
    for a, b in itertools.combinations(buffers, 2):
        if a.start <= b.end and b.start <= a.end:
            assert (
                offsets[a.name] + a.bytes <= offsets[b.name] or offsets[b.name] + b.bytes <= offsets[a.name]
            )


def test_arenas_stay_near_what_lives_at_once() -> None:
    """1.02 at most over these when written, 48 of 50 without a gap; 1.05 and 45 where no order was tried again. Nothing
    bounds a greedy packing so tightly: this notices if it gets worse."""
    found = [planned(RandomProgram(seed, 30)) for seed in range(50)]
    assert all(one.bytes >= one.live_bytes for one in found)
    assert max(one.bytes / one.live_bytes for one in found) < 1.04
    assert sum(one.bytes == one.live_bytes for one in found) > 46


def chain(length: int, kind: str = "softmax", **more: object) -> DeviceProgram:
    return DeviceProgram(
        inputs=("v0",),
        outputs=(f"v{length}",),
        operations=tuple(
            Operation(kind=kind, inputs=(f"v{i}",), outputs=(f"v{i + 1}",), settings=dict(more))  # type: ignore[arg-type]
            for i in range(length)
        ),
    )


SPEC = ((2, 8, 32), torch.float32)  # 2048 bytes
SILU = {"program": '[["silu", 0]]', "results": [1]}


def test_a_chain_needs_two_buffers_and_pointwise_chains_one() -> None:
    for length in (1, 2, 9):
        program = chain(length, axis=-1)
        assert plan(program, shapes(program, {}, {"v0": SPEC})).bytes == 2 * 2048
        program = chain(length, "pointwise", **SILU)
        assert plan(program, shapes(program, {}, {"v0": SPEC})).bytes == 2048


def test_an_input_that_is_kept_is_not_taken_over() -> None:
    program = chain(1, "pointwise", **SILU)
    found = plan(program, shapes(program, {}, {"v0": SPEC}), frozenset({"v0"}))
    assert found.bytes == 2 * 2048 and not found.in_place
    with pytest.raises(ValueError, match="keep=v1"):
        plan(program, shapes(program, {}, {"v0": SPEC}), frozenset({"v1"}))


def linear(inputs: tuple[str | None, ...]) -> dict[str, str]:
    program = DeviceProgram(
        inputs=("x", "r"), outputs=("y",),
        operations=(Operation(kind="linear", inputs=inputs, outputs=("y",)),),
    )  # fmt: skip
    weights = {"w": torch.zeros(8, 8)}
    spec = ((2, 4, 8), torch.float32)
    return dict(plan(program, shapes(program, weights, {"x": spec, "r": spec})).in_place)


def test_a_product_takes_over_its_residual_but_not_its_factor() -> None:
    assert linear(("x", "w", None, "r")) == {"y": "r"}
    assert linear(("x", "w", None, "x")) == {}
    assert linear(("x", "w")) == {}


def test_a_view_keeps_what_it_shows_alive() -> None:
    """A view of v1 is read at the end, so nothing may lie where v1 is."""
    program = DeviceProgram(
        inputs=("v0",),
        outputs=("y",),
        operations=(
            Operation(kind="softmax", inputs=("v0",), outputs=("v1",), settings={"axis": -1}),
            Operation(kind="columns", inputs=("v1",), outputs=("view",), settings={"start": 0, "stop": 16}),
            Operation(
                kind="columns", inputs=("view",), outputs=("narrow",), settings={"start": 4, "stop": 12}
            ),
            Operation(kind="softmax", inputs=("v0",), outputs=("v2",), settings={"axis": -1}),
            Operation(kind="matmul", inputs=("v2", "w"), outputs=("v3",)),
            Operation(kind="concat", inputs=("v3", "narrow"), outputs=("y",), settings={"axis": -1}),
        ),
    )
    found = plan(program, shapes(program, {"w": torch.zeros(32, 32)}, {"v0": SPEC}))
    assert found.views == {"view": "v1", "narrow": "v1"}
    others = [found.offsets[name] for name in ("v2", "v3", "y")]
    assert all(abs(at - found.offsets["v1"]) >= 2048 for at in others)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (1, 3, 1, 1, 1), (2, 1, 4, 5), (2, 3, 4), (2, 3), (4,)])
def test_values_lie_as_the_contract_has_it(shape: tuple[int, ...]) -> None:
    size = memory.size_of((shape, torch.float16))
    x = memory.place(torch.zeros(1024 + size, dtype=torch.uint8), 512, (shape, torch.float16))
    for value in (x, memory.empty((shape, torch.float16), "cpu")):
        assert value.shape == shape
        assert (value.movedim(1, -1) if len(shape) >= 4 else value).is_contiguous()
        assert dense(value).data_ptr() == value.data_ptr()
    assert x.storage_offset() == 256


def test_what_does_not_fit_is_refused_by_name() -> None:
    program = chain(2, "layer_norm", eps=1e-5)
    with pytest.raises(ValueError, match="v0 is missing"):
        shapes(program, {}, {})
    bad = Operation(kind="linear", inputs=("v0", "w"), outputs=("y",))
    program = DeviceProgram(inputs=("v0",), outputs=("y",), operations=(bad,))
    with pytest.raises(ValueError, match="linear y: "):
        shapes(program, {"w": torch.zeros(3, 3)}, {"v0": SPEC})
    two = DeviceProgram(
        inputs=("v0",), outputs=("y",),
        operations=(Operation(kind="softmax", inputs=("v0",), outputs=("y", "z"), settings={"axis": 0}),),
    )  # fmt: skip
    with pytest.raises(ValueError, match="makes 1 values, has 2 outputs"):
        shapes(two, {}, {"v0": SPEC})


def test_settings_that_no_operator_takes_are_refused_in_its_name() -> None:
    image = Operation(kind="convolution", inputs=("x", "w"), outputs=("y",),
                      settings={"stride": [0, 0], "padding": [0, 0], "dilation": [1, 1], "groups": 1})  # fmt: skip
    program = DeviceProgram(inputs=("x",), outputs=("y",), operations=(image,))
    with pytest.raises(ValueError, match="convolution y: "):
        shapes(program, {"w": torch.ones(1, 1, 1, 1)}, {"x": ((1, 1, 4, 4), torch.float32)})
