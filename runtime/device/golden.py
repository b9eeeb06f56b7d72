"""What a library must prove before its results are trusted: convolutions are right, and samples do not mix.

Both are asked of the device at hand when a model is loaded, for the shapes that it will run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import memory
from .executor import Call, Executor, Form, eager
from .memory import Spec
from .operations import dense, evaluate
from .program import VIEWS, DeviceProgram, Operation

LARGEST_SIDE = 8
"""Voxels along an axis in a check of a convolution: the kinds of borders that a large volume has, in little time."""
ENOUGH = 4096
"""Results after which two algorithms that round differently are taken to have shown it."""
MOST_DRAWS = 8

_MOVES_ONLY = VIEWS | {"cast", "concat", "expand", "pad", "reshape", "transpose"}
_ROUNDING = {
    torch.float64: 2.0**-52, torch.float32: 2.0**-10, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7,
}  # fmt: skip


def check_convolutions(
    program: DeviceProgram, weights: Mapping[str, Tensor], inputs: Mapping[str, Spec], device: torch.device
) -> None:
    """Run each distinct convolution of `program` once on `device` and compare with PyTorch's float32 on the CPU.

    Inputs and weights are -1 and 1: exact in every dtype, TF32 included, and so are sums of products, integers below
    2^24, in whatever order a direct method adds them. What is left is the rounding of the result, half an eps of it;
    methods that transform the tiles first (Winograd's) round there too, in the same dtype. Allowed: 4 eps of the
    largest result, eps of TF32 (2^-10) for float32. One tap of 27 left out would be about 0.2 of the largest result.

    Raises ValueError, naming the operation, the libraries and the remedy, where a result is further off.
    """
    specs = memory.shapes(program, weights, inputs)
    forms: Mapping[str, Form] = {}
    if device.type == "cuda":
        from .fused import FORMS

        forms = FORMS
    checked = set()
    for operation in program.operations:
        if operation.kind not in ("convolution", "transposed_convolution"):
            continue
        source, kernel = operation.inputs[:2]
        assert source is not None and kernel is not None
        (_, channels, *sides), dtype = specs[source]
        shape = (1, channels, *(min(side, LARGEST_SIDE) for side in sides))
        of_weight = tuple(weights[kernel].shape if kernel in weights else specs[kernel][0])
        signature = (operation.kind, json.dumps(operation.settings, sort_keys=True), shape, of_weight, dtype)
        if signature not in checked:
            checked.add(signature)
            _check_convolution(operation, shape, of_weight, dtype, device, forms.get(operation.kind, eager))


def _check_convolution(
    operation: Operation, shape: tuple[int, ...], of_weight: tuple[int, ...], dtype: torch.dtype,
    device: torch.device, form: Form,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x, weight = (_signs(size, generator) for size in (shape, of_weight))
    plain = operation.model_copy(update={"inputs": operation.inputs[:2]})
    (exact,) = evaluate(plain, [x, weight])
    exact = exact.round()  # no sum was inexact, however the CPU added
    y = memory.empty((tuple(exact.shape), dtype), device)
    with torch.no_grad():
        form(plain, [dense(v.to(device, dtype)) for v in (x, weight)], [y])
    error = float((y.cpu().float() - exact).abs().nan_to_num(torch.inf).max())
    allowed = 4 * _ROUNDING[dtype] * float(exact.abs().max())
    if error > allowed:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"[{operation.kind}] {operation.outputs[0]}, weight {of_weight}: the {name} result is off by {error:.3g}, "
            f"{allowed:.3g} is allowed, with {_libraries(device)}; some releases are wrong here (cuDNN 9.10: bfloat16 in "
            "3D): upgrade nvidia-cudnn and PyTorch, or build with --precision fp16"
        )


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


def _libraries(device: torch.device) -> str:
    if device.type != "cuda":
        return f"PyTorch {torch.__version__}"
    number = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    version = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return f"cuDNN {version}, PyTorch {torch.__version__}, {torch.cuda.get_device_name(device)}"


def find_variant(executor: Executor) -> frozenset[str]:
    """The first outputs of the operations whose bits depend on the batch, for `Executor`'s `per_sample`.

    Libraries choose an algorithm by the sizes of a call: a sample in a batch of 8 may then round otherwise than alone.
    Every operation that computes is tried on random data, once a distinct signature; those whose tensors do not begin
    with the batch have no samples to try and stay out. Overwrites the arena.
    """
    if executor.batch == 1:
        return frozenset()
    known: dict[str, bool] = {}
    found = set()
    for call in executor.calls:
        if call.operation.kind in _MOVES_ONLY or call.samples is None:
            continue
        signature = _signature(call)
        if signature not in known:
            known[signature] = batch_invariant(call)
        if not known[signature]:
            found.add(call.operation.outputs[0])
    return frozenset(found)


def batch_invariant(call: Call) -> bool:
    """Whether one call on N samples gives bit for bit what N calls on one give, on random data.

    Several draws where the results are few, up to 8. Overwrites the values that the call reads and writes, no weight.
    """
    results = sum(y.numel() for y in call.outputs)
    draws = min(MOST_DRAWS, -(-ENOUGH // results))
    with torch.no_grad():
        return all(_same_bits(call, draw) for draw in range(draws))


def _same_bits(call: Call, seed: int) -> bool:
    def results(run: Callable[[], None]) -> list[Tensor]:
        # Again each time: the call may have overwritten what it read.
        generator = torch.Generator(call.outputs[0].device).manual_seed(seed)
        for x in call.values:
            if x.is_floating_point():
                x.normal_(generator=generator)
        run()
        return [y.clone() for y in call.outputs]

    return all(map(_equal, results(call.at_once), results(call.by_sample)))


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def _signature(call: Call) -> str:
    def described(x: Tensor | None) -> Any:
        if x is None:
            return None
        return tuple(x.shape), x.stride(), str(x.dtype), x.data_ptr() % memory.ALIGNMENT

    operation = call.operation
    tensors = [described(x) for x in (*call.inputs, *call.outputs)]
    return json.dumps([operation.kind, operation.settings, tensors], sort_keys=True)
