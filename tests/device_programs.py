"""Random device programs over all kinds, small enough to run by the hundred."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from device_exact import exact
from torch import Tensor

from volcast.kernels import phase_weights
from volcast.runtime.device.memory import Spec, empty
from volcast.runtime.device.operations import dense, evaluate
from volcast.runtime.device.program import DeviceProgram, Operation

CHANNELS = (8, 16)
Definition = Callable[[Operation, list[Any]], list[Tensor]]


def run(
    operations: Iterable[Operation], values: Mapping[str, Tensor], define: Definition = evaluate
) -> dict[str, Tensor]:
    """Every value, each in memory of its own; in float64 with `define=exact`."""
    known = {name: x.double() for name, x in values.items()} if define is exact else dict(values)
    for operation in operations:
        given = [None if name is None else known[name] for name in operation.inputs]
        results = define(operation, given)
        known |= {name: dense(y).clone() for name, y in zip(operation.outputs, results, strict=True)}
    return known


class RandomProgram:
    """`operations` random operations on inputs x `N 8 2 3 2`, image `N 8 4 3`, row `[N, 24]`, then what is unread returned.

    Values stay near 1: every operation that could grow them is followed by nothing that multiplies them by itself.
    """

    def __init__(
        self, seed: int, operations: int, batch: int = 2, dtype: torch.dtype = torch.float32
    ) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.batch = dtype, batch
        self.inputs: dict[str, Spec] = {
            "x": ((batch, 8, 2, 3, 2), dtype), "image": ((batch, 8, 4, 3), dtype), "row": ((batch, 24), torch.float32),
        }  # fmt: skip
        self.weights: dict[str, Tensor] = {}
        self.operations: list[Operation] = []
        self.values = {name: empty(spec, "meta") for name, spec in self.inputs.items()}
        makers = [getattr(self, name) for name in dir(self) if name.startswith("add_")]
        while len(self.operations) < operations:
            self.random.choice(makers)()
        read = {name for operation in self.operations for name in operation.inputs}
        made = [name for operation in self.operations for name in operation.outputs]
        outputs = [name for name in made if name not in read or self.random.random() < 0.05]
        self.program = DeviceProgram(
            inputs=tuple(self.inputs), outputs=tuple(outputs), operations=tuple(self.operations)
        )

    def data(self) -> dict[str, Tensor]:
        """Random inputs."""
        return {
            name: dense(torch.randn(shape, generator=self.generator).to(dtype))
            for name, (shape, dtype) in self.inputs.items()
        }

    def weight(self, *shape: int, dtype: torch.dtype | None = None, mean: float = 0) -> str:
        name = f"w{len(self.weights)}"
        fan = max(1, torch.Size(shape[1:]).numel())
        value = mean + torch.randn(shape, generator=self.generator) / fan**0.5
        self.weights[name] = value.to(dtype or self.dtype)
        return name

    def pick(self, *ranks: int, channels: int | None = None) -> str | None:
        """A value of the program's dtype with one of these ranks; recent ones rather."""
        found = [
            name for name, x in self.values.items()
            if x.ndim in ranks and x.dtype == self.dtype and name != "row" and x.shape[0] == self.batch
            and channels in (None, self.channels(name))
        ]  # fmt: skip
        return self.random.choice(found[-6:]) if found else None

    def alike(self, name: str, *others: str) -> str | None:
        """Another value of the same shape, dense."""
        x = self.values[name]
        found = [
            key for key, y in self.values.items()
            if y.shape == x.shape and y.dtype == x.dtype and key not in (name, *others) and key != "row"
            and y.stride() == x.stride()
        ]  # fmt: skip
        return self.random.choice(found) if found else None

    def channels(self, name: str) -> int:
        x = self.values[name]
        return int(x.shape[1 if x.ndim >= 4 else -1])

    def is_dense(self, name: str) -> bool:
        x = self.values[name]
        return dense(x).stride() == x.stride()

    def sometimes(self) -> bool:
        return self.random.random() < 0.5

    def columns(self, count: int) -> str:
        """Some of the row's columns, as the time embedding has it."""
        start = self.random.randint(0, 24 - count)
        (name,) = self.add("columns", ["row"], {"start": start, "stop": start + count})
        return name

    def add(
        self, kind: str, inputs: list[str | None], settings: dict[str, Any], outputs: int = 1
    ) -> list[str]:
        names = [f"v{len(self.values) + i}" for i in range(outputs)]
        operation = Operation(kind=kind, inputs=tuple(inputs), outputs=tuple(names), settings=settings)  # type: ignore[arg-type]
        given = [
            None
            if name is None
            else self.values[name]
            if name in self.values
            else self.weights[name].to("meta")
            for name in inputs
        ]
        results = evaluate(operation, given)
        as_is = kind in ("columns", "tokens", "volume")
        self.values |= {n: y if as_is else dense(y) for n, y in zip(names, results, strict=True)}
        self.operations.append(operation)
        return names

    def add_convolution(self) -> None:
        x = self.pick(3, 4, 5)
        if x is None:
            return
        axes, cin, cout = self.values[x].ndim - 2, int(self.values[x].shape[1]), self.random.choice(CHANNELS)
        if cin % 2 or (axes == 1 and self.values[x].shape[2] > 64):
            return
        groups, side = self.random.choice((1, 2)), self.random.choice((1, 3))
        settings = {
            "stride": [self.random.choice((1, 2))] * axes, "padding": [side // 2] * axes, "dilation": [1] * axes,
            "groups": groups,
        }  # fmt: skip
        bias = [self.weight(cout, dtype=torch.float32)] if self.sometimes() else []
        self.add("convolution", [x, self.weight(cout, cin // groups, *(side,) * axes), *bias], settings)

    def add_transposed_convolution(self) -> None:
        x = self.pick(4, 5)
        if x is None or self.values[x][0].numel() > 10000:
            return
        axes, cin = self.values[x].ndim - 2, self.channels(x)
        settings = {
            "stride": [2] * axes, "padding": [1] * axes, "dilation": [1] * axes, "output_padding": [1] * axes,
            "groups": 1,
        }  # fmt: skip
        self.add("transposed_convolution", [x, self.weight(cin, 8, *(3,) * axes), self.weight(8)], settings)

    def add_upsample_convolution(self) -> None:
        x = self.pick(4, 5)
        if x is None or not self.is_dense(x) or self.values[x][0].numel() > 10000 or self.channels(x) % 8:
            return
        axes, cout = self.values[x].ndim - 2, self.random.choice(CHANNELS)
        name = self.weight(cout, self.channels(x), *(3,) * axes)
        self.weights[name] = phase_weights(self.weights[name])
        bias = [self.weight(cout, dtype=torch.float32)] if self.sometimes() else []
        self.add("upsample_convolution", [x, name, *bias], {})

    def add_input_head(self) -> None:
        x = self.pick(4, 5, channels=8)
        if x is not None and self.is_dense(x):
            self.add(
                "input_head", [x, self.weight(16, 8, *(3,) * (self.values[x].ndim - 2)), self.weight(16)], {}
            )

    def add_output_head(self) -> None:
        x = self.pick(4, 5)
        if x is not None and self.is_dense(x) and self.channels(x) % 4 == 0:
            c = self.channels(x)
            self.add(
                "output_head",
                [x, self.weight(c, mean=1), self.weight(c), self.weight(2, c, *(3,) * (self.values[x].ndim - 2)),
                 self.weight(2)],
                {"groups": 4, "eps": 1e-5, "activation": self.random.choice(("none", "silu"))},
            )  # fmt: skip

    def add_group_norm(self) -> None:
        x = self.pick(4, 5)
        if x is None or not self.is_dense(x):
            return
        residual = self.alike(x) if self.sometimes() else None
        second = self.alike(x, residual or "") if self.sometimes() else None
        c = self.channels(x)
        if c % 4 or c > 24:
            return
        shift = self.columns(c) if self.sometimes() else None
        total = c + (0 if second is None else self.channels(second))
        self.add(
            "group_norm",
            [x, self.weight(total, dtype=torch.float32, mean=1), self.weight(total), shift, residual, second],
            {"groups": 4, "eps": 1e-5, "activation": self.random.choice(("none", "silu"))},
            1 if residual is None else 2,
        )

    def add_layer_norm(self) -> None:
        x = self.pick(3)
        if x is None or not self.is_dense(x) or self.channels(x) > 24:
            return
        c = self.channels(x)
        residual = self.alike(x) if self.sometimes() else None
        shift = self.columns(c) if self.sometimes() else None
        extra = [] if shift is None and residual is None else [shift, residual]
        self.add(
            "layer_norm",
            [x, self.weight(c, mean=1), self.weight(c), *extra],
            {"eps": 1e-5},
            2 if extra else 1,
        )

    def add_linear(self) -> None:
        x = self.pick(2, 3, 4, 5)
        if x is None:
            return
        cout = self.random.choice((*CHANNELS, self.channels(x)))
        weight = self.weight(self.channels(x), cout)
        bias = self.weight(cout, dtype=torch.float32) if self.sometimes() else None
        residual = None
        if self.sometimes():
            residual = self.pick(self.values[x].ndim, channels=cout)
            if residual is not None and self.values[residual].shape != (
                self.values[x].shape[:1] + (cout,) + self.values[x].shape[2:]
                if self.values[x].ndim >= 4
                else (*self.values[x].shape[:-1], cout)
            ):
                residual = None
        self.add("linear", [x, weight, bias, residual], {})

    def add_attention(self) -> None:
        x = self.pick(3)
        if x is None or self.channels(x) % 8 or self.channels(x) > 16 or self.values[x].shape[1] > 100:
            return
        (qkv,) = self.add("linear", [x, self.weight(self.channels(x), 48)], {})
        parts = [self.add("columns", [qkv], {"start": s, "stop": s + 16})[0] for s in (0, 16, 32)]
        self.add("attention", [*parts], {"heads": self.random.choice((1, 2)), "scale": 0.3})

    def add_pointwise(self) -> None:
        x = self.pick(2, 3, 4, 5)
        if x is None:
            return
        full: list[str | None] = [x, *(name for name in [self.alike(x)] if name is not None)]
        rest: list[str | None] = []
        if self.channels(x) <= 24 and self.sometimes():
            rest.append(self.columns(self.channels(x)))
        if self.sometimes():
            rest.append(self.weight(self.channels(x), dtype=torch.float32))
        inputs = full + rest
        steps: list[list[Any]] = [["silu", 0]]
        for register in range(1, len(inputs)):
            steps.append(["add", len(inputs) + len(steps) - 1, register])
        last = len(inputs) + len(steps) - 1
        results = [last] if self.sometimes() else [last, len(inputs)]
        self.add("pointwise", inputs, {"program": json.dumps(steps), "results": results}, len(results))

    def add_concat(self) -> None:
        x = self.pick(3, 4, 5)
        other = None if x is None else self.alike(x)
        if x is not None and other is not None and self.channels(x) <= 16:
            self.add("concat", [x, other], {"axis": -1 if self.values[x].ndim == 3 else 1})

    def add_cast(self) -> None:
        like = self.pick(3, 4, 5)
        if like is not None:
            self.add("cast", [self.columns(self.random.choice(CHANNELS)), like], {})

    def add_columns(self) -> None:
        x = self.pick(3, 4, 5)
        if x is not None and self.channels(x) > 8:
            start = self.channels(x) - 8
            self.add("columns", [x], {"start": start, "stop": start + 8})

    def add_tokens(self) -> None:
        x = self.pick(4, 5)
        if x is not None:
            (tokens,) = self.add("tokens", [x], {})
            if self.sometimes():
                (made,) = self.add("linear", [tokens, self.weight(self.channels(x), 8)], {})
                self.add("volume", [made, x], {})

    def add_movement(self) -> None:
        x = self.pick(3, 5)
        if x is None:
            return
        rank = self.values[x].ndim
        kind = self.random.choice(("reshape", "transpose", "expand", "pad"))
        if kind == "reshape":
            sizes: list[Any] = [0, -1, [1, 2]] if rank == 5 else [0, 0, -1]
            self.add("reshape", [x, "x"], {"sizes": sizes})
        elif kind == "transpose":
            self.add("transpose", [x], {"order": [0, *reversed(range(1, rank))]})
        elif kind == "expand":
            (one,) = self.add("reshape", [x], {"sizes": [0, 1, -1]})
            if self.values[one].shape[2] <= 64:
                self.add("expand", [one], {"sizes": [1, 3, 1]})
        elif max(self.values[x].shape[2:]) < 8:
            self.add("pad", [x], {"widths": [1, 0, 0, 2], "value": 0.5})

    def add_product(self) -> None:
        x = self.pick(3)
        if x is None or self.values[x].shape[1] > 64 or self.values[x].shape[2] > 64:
            return
        (turned,) = self.add("transpose", [x], {"order": [0, 2, 1]})
        if self.sometimes():
            (scores,) = self.add("matmul", [x, turned], {})
        else:
            (scores,) = self.add("einsum", [x, x], {"equation": "nlc,nmc->nlm"})
        self.add("softmax", [scores], {"axis": -1})

    def add_sampling(self) -> None:
        x = self.pick(4, 5)
        if x is None or self.values[x][0].numel() > 10000:
            return
        axes = self.values[x].ndim - 2
        if self.sometimes():
            self.add("resize", [x], {"mode": "nearest", "scale": [2.0] * axes, "align_corners": None})
        elif min(self.values[x].shape[2:]) >= 2:
            self.add(
                "average_pool", [x],
                {"kernel": [2] * axes, "stride": [2] * axes, "padding": [0] * axes, "ceil_mode": False,
                 "count_include_pad": True},
            )  # fmt: skip
