"""Programs of elementwise steps in single assignment.

Registers 0, 1, .. are the inputs, each step appends one:

    ["add", i, j] ["sub", i, j] ["mul", i, j] ["div", i, j] ["neg", i] ["constant", value]
    ["sigmoid", i] ["silu", i] ["gelu", i] ["gelu_tanh", i] ["relu", i] ["leaky_relu", i, slope]
    ["exp", i] ["sqrt", i] ["sin", i] ["cos", i] ["clamp", i, low or null, high or null]

with PyTorch's meanings, gelu by the error function. All registers are float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Step = tuple[str | int | float | None, ...]
MOST_RESULTS = 4

# What follows the operation's name: r a register, n a number, b a number or null.
_ARGUMENTS = {
    "add": "rr", "sub": "rr", "mul": "rr", "div": "rr", "neg": "r", "constant": "n",
    "sigmoid": "r", "silu": "r", "gelu": "r", "gelu_tanh": "r", "relu": "r", "leaky_relu": "rn",
    "exp": "r", "sqrt": "r", "sin": "r", "cos": "r", "clamp": "rbb",
}  # fmt: skip


def parse_program(text: str, inputs: int) -> tuple[Step, ...]:
    """The steps of a program over so many inputs. Raises ValueError, naming the step, for what is none."""
    try:
        listed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"[pointwise] program is no JSON: {error}") from error
    if type(listed) is not list:
        raise ValueError(f"[pointwise] program={text!r}: need a list of steps")
    return tuple(_step(step, place, inputs + place) for place, step in enumerate(listed))


def _step(step: Any, place: int, registers: int) -> Step:
    where = f"[pointwise] step {place} {json.dumps(step)}"
    name, *arguments = step if isinstance(step, list) and step else [None]
    kinds = _ARGUMENTS.get(name) if isinstance(name, str) else None
    if kinds is None:
        raise ValueError(f"{where}: need one of {', '.join(_ARGUMENTS)}")
    if len(arguments) != len(kinds):
        raise ValueError(f"{where}: need {len(kinds)} arguments")
    for kind, value in zip(kinds, arguments, strict=True):
        if kind == "r":
            if type(value) is not int or not 0 <= value < registers:
                raise ValueError(f"{where}: register {value!r}: need one of 0 to {registers - 1}")
        elif not (kind == "b" and value is None) and not _is_number(value):
            raise ValueError(f"{where}: {value!r}: need a finite number of float32")
    if name == "clamp" and arguments[1:] == [None, None]:
        raise ValueError(f"{where}: need a bound; leave the step out")
    return name, *(
        float(v) if k != "r" and v is not None else v for k, v in zip(kinds, arguments, strict=True)
    )


def _is_number(value: Any) -> bool:
    return (
        type(value) in (int, float) and math.isfinite(value) and abs(value) <= torch.finfo(torch.float32).max
    )


def check_results(results: list[int], registers: int) -> None:
    if not 1 <= len(results) <= MOST_RESULTS or not all(0 <= result < registers for result in results):
        raise ValueError(
            f"[pointwise] results={results}: need 1 to {MOST_RESULTS} registers of 0 to {registers - 1}"
        )


def _gelu_tanh(a: Tensor) -> Tensor:
    return F.gelu(a, approximate="tanh")


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg,
    "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu": F.relu,
    "leaky_relu": F.leaky_relu, "exp": torch.exp, "sqrt": torch.sqrt, "sin": torch.sin, "cos": torch.cos,
    "clamp": torch.clamp,
}  # fmt: skip


def evaluate(steps: tuple[Step, ...], inputs: list[Tensor]) -> list[Tensor]:
    """All registers: PyTorch's operators step by step, broadcasting as they do."""
    registers = list(inputs)
    for name, *arguments in steps:
        assert isinstance(name, str)
        values = [
            registers[value] if kind == "r" and isinstance(value, int) else value
            for kind, value in zip(_ARGUMENTS[name], arguments, strict=True)
        ]
        registers.append(_OPERATORS[name](*values) if name != "constant" else _constant(values[0], inputs[0]))
    return registers


def _constant(value: Any, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)
