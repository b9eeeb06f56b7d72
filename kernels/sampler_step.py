"""One step of a sampling plan on the device: what csrc/loop.cpp does after a network call, by the same table.

    out  = uncond + guidance * (out - uncond), rounded to float32        if uncond is given (arXiv:2207.12598)
    h    = clip(p * x + q * out, lo, hi)
    next = a * (from_saved ? saved : x) + d * out + e * h + sum_k b[k] * history[read[k]] + c * normal
    if (save) saved = x;  if (write >= 0) history[write] = h;  x = next;  network_input = x

in float64, rounded to float32 where a tensor keeps it. The row is picked by a counter that lies on the device and that
the step itself moves on, so one captured CUDA graph, replayed, walks through the whole plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .check import check_device_shared, check_dtype, check_shape, is_channels_last
from .impl import Impl, resolve_impl
from .philox import standard_normal

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHTS = ("a", "d", "p", "q", "lo", "hi", "e", "b", "c")
SLOTS = ("read", "write", "from_saved", "save")
LARGEST = 2**34  # values of a sample: four to each of Philox's 2^32 counters


class PlanTable(NamedTuple):
    """The rows of a plan on a device; make it with `plan_table`. Tensors may be rewritten between requests."""

    weights: Tensor  # float64 [steps, 11]: a d p q lo hi e b b b c
    slots: Tensor  # int32 [steps, 6]: read read read write from_saved save
    history_slots: int
    keeps_saved: bool


def plan_table(rows: NDArray[Any], device: torch.device | str = "cpu") -> PlanTable:
    """`Plan.rows`, a structured array with the fields of `Row` in csrc/plan.hpp, as tensors."""
    names = rows.dtype.names or ()
    missing = [name for name in (*WEIGHTS, *SLOTS) if name not in names]
    if missing or rows.ndim != 1 or len(rows) == 0:
        raise ValueError(
            f"[plan_table] rows of shape {rows.shape} without the fields {missing}: need at least one row of a Plan"
        )

    def columns(fields: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        parts = [torch.tensor(rows[name].tolist(), dtype=dtype).reshape(len(rows), -1) for name in fields]
        return torch.cat(parts, 1).to(device)

    return PlanTable(
        weights=columns(WEIGHTS, torch.float64),
        slots=columns(SLOTS, torch.int32),
        history_slots=1 + max(int(rows["write"].max()), int(rows["read"].max())),
        keeps_saved=bool(rows["save"].any() or rows["from_saved"].any()),
    )


def step_counter(samples: int, device: torch.device | str = "cpu") -> Tensor:
    """int32 [2 + N]: the row to apply next (0), tickets of running programs (0), and of each sample the first row
    whose network output or x was not finite (-1: none). Copy a fresh one over it to begin again."""
    return torch.tensor([0, 0] + [-1] * samples, dtype=torch.int32, device=device)


def sampler_step(
    x: Tensor,  # float32 N C *spatial, contiguous or channels last; changed in place
    out: Tensor,  # as x, float32, float16 or bfloat16: the network's output
    table: PlanTable,
    counter: Tensor,  # of `step_counter`; moved on by one
    *,
    seeds: Tensor,  # int64 [N], the bits of uint64
    samples: Tensor,  # int64 [N], the bits of uint64
    history: Tensor | None = None,  # float32 [slots, N, C, *spatial], each slot as x; need not be initialised
    saved: Tensor | None = None,  # float32, as x; need not be initialised
    uncond: Tensor | None = None,  # as out: the output without the condition
    guidance: Tensor | None = None,  # float64 [N], with uncond
    network_input: Tensor | None = None,  # as x, or twice as many samples; any dtype of out
    impl: Impl | str | None = None,
) -> None:
    """Applies row `counter[0]` to every sample and moves the counter on; past the last row it does nothing.

    All tensors of x's shape have x's layout. Noise is numbered in N C D H W order whatever the layout, by csrc/noise's
    streams. `network_input` gets the new x, once or, for guidance by one call, twice. A value that is not finite does
    not stop it: `counter[2:]` says where it began; csrc raises there. Keep the tensors' addresses to replay a graph:
    everything that differs between requests is read from them, but the number of rows and the checks of this call: a table
    rewritten for a replay has as many rows, and slots that `history` holds. Raises ValueError for tensors that do not match.
    """
    _check(x, out, table, counter, seeds, samples, history, saved, uncond, guidance, network_input)
    tensors = (x, out, uncond, guidance, history, saved, network_input, table.weights, table.slots, counter,
               seeds, samples)  # fmt: skip
    if impl is None:
        torch.ops.volcast.sampler_step(*tensors)
    elif resolve_impl("sampler_step", impl, x) is Impl.TRITON:
        _triton(*tensors)
    else:
        _eager(*tensors)


def _eager(
    x: Tensor, out: Tensor, uncond: Tensor | None, guidance: Tensor | None, history: Tensor | None,
    saved: Tensor | None, network_input: Tensor | None, weights: Tensor, slots: Tensor, counter: Tensor,
    seeds: Tensor, samples: Tensor,
) -> None:  # fmt: skip
    step = int(counter[0])
    if not 0 <= step < len(weights):
        return
    a, d, p, q, low, high, e, *b, c = weights[step].tolist()
    *read, write, from_saved, save = slots[step].tolist()
    one = (-1,) + (1,) * (x.ndim - 1)
    output = out.float()
    if uncond is not None and guidance is not None:
        u = uncond.double()
        output = (u + guidance.reshape(one) * (out.double() - u)).float()
    now, shown = x.double(), output.double()
    start = saved.double() if from_saved and saved is not None else now
    following = a * start + d * shown
    h = p * now + q * shown
    h = torch.where(h < low, low, h)
    h = torch.where(h > high, high, h)
    if e != 0 or write >= 0:
        following = following + e * h
    for slot, weight in zip(read, b, strict=True):
        if slot >= 0 and history is not None:
            following = following + weight * history[slot].double()
    if c != 0:
        normal = standard_normal(seeds, samples, step + 1, x[0].numel()).float()
        following = following + c * normal.reshape(x.shape).double()
    if save and saved is not None:
        saved.copy_(x)
    if write >= 0 and history is not None:
        history[write].copy_(h.float())
    x.copy_(following.float())
    if network_input is not None:
        network_input.copy_(torch.cat([x] * (len(network_input) // len(x))))
    finite = (output.isfinite() & x.isfinite()).flatten(1).all(1)
    counter[2:] = torch.where(~finite & (counter[2:] < 0), step, counter[2:])
    counter[0] += 1


def _triton(
    x: Tensor, out: Tensor, uncond: Tensor | None, guidance: Tensor | None, history: Tensor | None,
    saved: Tensor | None, network_input: Tensor | None, weights: Tensor, slots: Tensor, counter: Tensor,
    seeds: Tensor, samples: Tensor,
) -> None:  # fmt: skip
    from .launch_triton import run
    from .sampler_step_triton import sampler_step_launches

    launches = sampler_step_launches(x, out, uncond, guidance, history, saved, network_input, weights, slots, counter,
                                     seeds, samples)  # fmt: skip
    run(launches, x.device)


def _check(
    x: Tensor, out: Tensor, table: PlanTable, counter: Tensor, seeds: Tensor, samples: Tensor,
    history: Tensor | None, saved: Tensor | None, uncond: Tensor | None, guidance: Tensor | None,
    network_input: Tensor | None,
) -> None:  # fmt: skip
    op, n = "sampler_step", len(x) if x.ndim else 0
    if x.ndim < 3 or 0 in x.shape or x.numel() // n > LARGEST:
        raise ValueError(
            f"[{op}] x has shape {tuple(x.shape)}: need N C *spatial, at most {LARGEST} values a sample"
        )
    contiguous = x.is_contiguous()
    if not contiguous and not is_channels_last(x):
        raise ValueError(f"[{op}] x has strides {x.stride()}: need contiguous memory or channels last")
    check_dtype(op, out=out, uncond=uncond)
    if network_input is not None:
        check_dtype(op, network_input=network_input)
    for name, tensor, dtype in (
        ("x", x, torch.float32), ("history", history, torch.float32), ("saved", saved, torch.float32),
        ("guidance", guidance, torch.float64), ("weights", table.weights, torch.float64),
        ("slots", table.slots, torch.int32), ("counter", counter, torch.int32), ("seeds", seeds, torch.int64),
        ("samples", samples, torch.int64),
    ):  # fmt: skip
        if tensor is not None and tensor.dtype != dtype:
            got, need = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype))
            raise ValueError(f"[{op}] {name} has dtype {got}: need {need}")
    steps, slots = len(table.weights), 0 if history is None else len(history)
    twice = network_input is not None and len(network_input) == 2 * n
    for name, tensor, shape in (
        ("out", out, x.shape), ("uncond", uncond, x.shape), ("saved", saved, x.shape),
        ("history", history, (slots, *x.shape)),
        ("network_input", network_input, (2 * n if twice else n, *x.shape[1:])),
        ("guidance", guidance, (n,)), ("weights", table.weights, (steps, 11)), ("slots", table.slots, (steps, 6)),
        ("counter", counter, (2 + n,)), ("seeds", seeds, (n,)), ("samples", samples, (n,)),
    ):  # fmt: skip
        if tensor is None:
            continue
        check_shape(op, name, tensor, tuple(shape))
        volume = tensor.ndim >= x.ndim and not contiguous
        if not (tensor.movedim(-x.ndim + 1, -1) if volume else tensor).is_contiguous():
            layout = "channels last, as x is" if volume else "contiguous memory"
            raise ValueError(f"[{op}] {name} has strides {tensor.stride()}: need {layout}")
    if (uncond is None) != (guidance is None):
        raise ValueError(f"[{op}] uncond and guidance belong together: give both or neither")
    if slots < table.history_slots or (table.keeps_saved and saved is None):
        raise ValueError(
            f"[{op}] {slots} history slots and saved={None if saved is None else 'given'}: the plan needs "
            f"{table.history_slots} slots{' and saved' if table.keeps_saved else ''}"
        )
    check_device_shared(op, x=x, out=out, uncond=uncond, guidance=guidance, history=history, saved=saved,
                        network_input=network_input, weights=table.weights, slots=table.slots, counter=counter,
                        seeds=seeds, samples=samples)  # fmt: skip


_MUTATED = ("x", "history", "saved", "network_input", "counter")


@torch.library.custom_op("volcast::sampler_step", mutates_args=_MUTATED)
def _sampler_step_op(
    x: Tensor, out: Tensor, uncond: Tensor | None, guidance: Tensor | None, history: Tensor | None,
    saved: Tensor | None, network_input: Tensor | None, weights: Tensor, slots: Tensor, counter: Tensor,
    seeds: Tensor, samples: Tensor,
) -> None:  # fmt: skip
    form = _triton if resolve_impl("sampler_step", None, x) is Impl.TRITON else _eager
    form(x, out, uncond, guidance, history, saved, network_input, weights, slots, counter, seeds, samples)


@_sampler_step_op.register_fake
def _sampler_step_fake(
    x: Tensor, out: Tensor, uncond: Tensor | None, guidance: Tensor | None, history: Tensor | None,
    saved: Tensor | None, network_input: Tensor | None, weights: Tensor, slots: Tensor, counter: Tensor,
    seeds: Tensor, samples: Tensor,
) -> None:  # fmt: skip
    return None
