"""A device program bound to sizes, weights and memory: `run()` launches its operations in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from volcast.kernels.impl import Impl

from . import memory
from .memory import Spec
from .operations import Values, evaluate
from .order import plan_order
from .program import DeviceProgram, Operation

Form = Callable[[Operation, Values, list[Tensor]], None]
"""Runs an operation: (operation, inputs, outputs to write)."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operation on the tensors that it reads and writes. `values`: the inputs in the arena. `samples`: the same, sample by sample, or None where its tensors do not all begin with the batch."""

    operation: Operation
    form: Form
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    samples: tuple[tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]], ...] | None

    def at_once(self) -> None:
        self.form(self.operation, self.inputs, list(self.outputs))

    def by_sample(self) -> None:
        """Each sample as a batch of one would run. Libraries choose by alignment too, so what lies otherwise than the
        first sample goes through a copy."""
        assert self.samples is not None
        for inputs, outputs in self.samples:
            pairs = zip(inputs, self.inputs, strict=True)
            read = [None if x is None or whole is None else _lying_as(whole, x, True) for x, whole in pairs]
            written = [_lying_as(whole, y, False) for y, whole in zip(outputs, self.outputs, strict=True)]
            self.form(self.operation, read, written)
            for y, made in zip(outputs, written, strict=True):
                if made is not y:
                    y.copy_(made)


@final
class Executor:
    """`program` for inputs of fixed shapes (`N ...`) and dtypes on one device.

    Write to `inputs`, call `run()`, read `outputs`: all are views into one arena, which several executors may share if
    they take turns. The order of `program` is `plan_order`'s, not the given one's. An input that is not in `keep` may be
    overwritten by a run. `DeviceProgram.offsets` are not added here: whoever fills the inputs adds them. `weights` lie
    on the device; those that a fused form wants otherwise are copied (see `fused.pack`, which avoids a copy an
    executor).

    `per_sample`: first outputs of operations to run sample by sample (see `golden.find_variant`).
    `impl`: None for `usual_impl`.

    Raises ValueError for what the program cannot take, for an arena that is too small or elsewhere.
    """

    def __init__(
        self,
        program: DeviceProgram,
        weights: Mapping[str, Tensor],
        inputs: Mapping[str, Spec],
        device: torch.device,
        arena: Tensor | None = None,
        *,
        keep: frozenset[str] = frozenset(),
        per_sample: frozenset[str] = frozenset(),
        impl: Impl | str | None = None,
    ) -> None:
        self.device, self.per_sample = device, per_sample
        self.impl = usual_impl(device) if impl is None else Impl(impl)
        forms: Mapping[str, Form] = {}
        if self.impl is Impl.TRITON:
            from .fused import FORMS, pack

            forms, weights = FORMS, pack(program, weights)
        self.weights = {name: weights[name] for name in program.weights() if name in weights}
        self.specs = memory.shapes(program, self.weights, inputs)
        self.program, self.plan = plan_order(program, self.specs, keep)
        self.arena = self._arena(arena)
        tensors = self._tensors()
        self.inputs = {name: tensors[name] for name in program.inputs}
        self.outputs = {name: tensors[name] for name in program.outputs}
        self.batch = inputs[program.inputs[0]][0][0]
        rows = _rows(program, self.weights, self.specs, self.batch)
        self.calls = tuple(
            self._call(operation, forms.get(operation.kind, eager), tensors, rows)
            for operation in self.program.operations
            if not memory.is_view(program, operation)
        )
        known = {call.operation.outputs[0]: call for call in self.calls}
        for name in sorted(per_sample):
            if name not in known or known[name].samples is None:
                raise ValueError(
                    f"[device program] per_sample={name}: need the first output of an operation by samples"
                )

    def run(self) -> None:
        """All operations in order, on the current stream of the device. Leaves no memory behind."""
        with torch.no_grad():
            for call in self.calls:
                if call.operation.outputs[0] in self.per_sample:
                    call.by_sample()
                else:
                    call.at_once()

    def peak_bytes(self) -> int:
        """What a run will need: the arena, the weights, and `besides`."""
        weights = {
            w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in self.weights.values()
        }
        return (
            self.plan.bytes
            + sum(weights.values())
            + besides(self.program, self.weights, self.specs, self.impl)
        )

    def _arena(self, given: Tensor | None) -> Tensor:
        if given is None:
            return torch.empty(self.plan.bytes, dtype=torch.uint8, device=self.device)
        right = given.dtype == torch.uint8 and given.ndim == 1 and given.device.type == self.device.type
        if not right or given.numel() < self.plan.bytes:
            raise ValueError(
                f"[device program] arena is {given.dtype} {tuple(given.shape)} on {given.device}: need uint8 "
                f"[{self.plan.bytes}] or more on {self.device}"
            )
        return given

    def _tensors(self) -> dict[str, Tensor]:
        """Every value and weight."""
        tensors = dict(self.weights)
        for name in self.program.inputs:
            tensors[name] = _settled(memory.place(self.arena, self.plan.offsets[name], self.specs[name]))
        for operation in self.program.operations:
            for name in operation.outputs:
                if name in self.plan.offsets:
                    tensors[name] = _settled(
                        memory.place(self.arena, self.plan.offsets[name], self.specs[name])
                    )
                else:
                    given = [None if source is None else tensors[source] for source in operation.inputs]
                    (view,) = evaluate(operation, given)
                    tensors[name] = _settled(view)
        return tensors

    def _call(
        self, operation: Operation, form: Form, tensors: Mapping[str, Tensor], rows: Mapping[str, int | None]
    ) -> Call:
        inputs = tuple(None if name is None else tensors[name] for name in operation.inputs)
        outputs = tuple(tensors[name] for name in operation.outputs)
        lengths = [0 if name is None else rows.get(name, 0) for name in operation.inputs]
        made = [rows[name] for name in operation.outputs]

        def part(of: int) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
            read = zip(inputs, lengths, strict=True)
            return (
                tuple(None if x is None else _part(x, length, of) for x, length in read),
                tuple(_part(y, length, of) for y, length in zip(outputs, made, strict=True)),
            )

        apart = self.batch == 1 or (None not in lengths and all(made))
        bases = {name: self.plan.views.get(name, name) for name in operation.inputs if name is not None}
        values = tuple(tensors[name] for name, base in bases.items() if base in self.plan.offsets)
        return Call(
            operation=operation, form=form, inputs=inputs, outputs=outputs, values=values,
            samples=tuple(map(part, range(self.batch))) if apart else None,
        )  # fmt: skip


def usual_impl(device: torch.device) -> Impl:
    """The fused forms on a GPU, PyTorch's elsewhere."""
    return Impl.TRITON if device.type == "cuda" else Impl.EAGER


def eager(operation: Operation, inputs: Values, outputs: list[Tensor]) -> None:
    """The form of any operation: its definition, then a copy."""
    for out, result in zip(outputs, evaluate(operation, inputs), strict=True):
        out.copy_(result)


def besides(
    program: DeviceProgram, weights: Mapping[str, Tensor], specs: Mapping[str, Spec], impl: Impl
) -> int:
    """Bytes that a run takes beside arena and weights: the most of one operation, which gives it back. cuDNN's own
    workspace is not known before it runs, and not in it."""
    tensors = {name: weights[name].to("meta") for name in program.weights()}
    tensors |= {name: memory.empty(spec, "meta") for name, spec in specs.items()}
    found = [0]
    for operation in program.operations:
        inputs = [None if name is None else tensors[name] for name in operation.inputs]
        if memory.is_view(program, operation):
            (tensors[operation.outputs[0]],) = evaluate(operation, inputs)
            continue
        outputs = [tensors[name] for name in operation.outputs]
        if impl is Impl.TRITON:
            from .fused import scratch_bytes

            found.append(scratch_bytes(operation, inputs, outputs))
        else:
            found.append(sum(y.nbytes for y in outputs))
    return max(found)


def _rows(
    program: DeviceProgram, weights: Mapping[str, Tensor], specs: Mapping[str, Spec], batch: int
) -> dict[str, int | None]:
    """Of each value: how many indices of its first axis are a sample's; 0 for the same in every batch; None where the
    batch is not (all of) its first axis. Found by comparison with a batch of one."""
    inputs = {name: specs[name] for name in program.inputs}
    inputs = {
        n: ((1, *shape[1:]) if shape[:1] == (batch,) else shape, dtype)
        for n, (shape, dtype) in inputs.items()
    }
    found: dict[str, int | None] = {}
    for name, (single, _) in memory.shapes(program, weights, inputs).items():
        shape = specs[name][0]
        if shape == single:
            found[name] = 0
        else:
            first = shape[0] == batch * single[0] and shape[1:] == single[1:]
            found[name] = single[0] if first else None
    return found


def _part(x: Tensor, length: int | None, sample: int) -> Tensor:
    return _settled(x.narrow(0, sample * length, length)) if length else x


def _settled(x: Tensor) -> Tensor:
    """x with the strides of a dense value along axes of size 1, where any would do: PyTorch's operators choose their way
    by them, so that a sample of a batch and one alone must have the same."""
    order = [0, *range(2, x.ndim), 1] if x.ndim >= 4 else list(range(x.ndim))
    strides, inner = list(x.stride()), 1
    for axis in reversed(order):
        if x.shape[axis] == 1:
            strides[axis] = inner
        inner = max(inner, strides[axis] * x.shape[axis])
    return x.as_strided(x.shape, strides, x.storage_offset())


def _lying_as(whole: Tensor, part: Tensor, filled: bool) -> Tensor:
    """`part`, or memory like it that begins as far behind a multiple of ALIGNMENT bytes as `whole` does.

    Triton looks at 16 bytes, PyTorch asks cuDNN for plans by up to 32 and cuBLASLt by up to 256.
    """
    odd = whole.data_ptr() % memory.ALIGNMENT
    if part.data_ptr() % memory.ALIGNMENT == odd:
        return part
    extent = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
    room = memory.ALIGNMENT // part.itemsize
    lines = torch.empty(room + extent, dtype=part.dtype, device=part.device)
    first = (odd - lines.data_ptr()) % memory.ALIGNMENT // part.itemsize
    copy = lines.as_strided(part.shape, part.stride(), first)
    return copy.copy_(part) if filled else copy
