"""Pinned launch configurations: a committed table, not a search at start-up.

`configurations.json` maps a kernel to rows; the first row that lists the dtype and whose `up_to` holds the size class
is taken. `benchmarks/tune.py` makes the table and writes into `basis` what it was judged by.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("configurations.json")

_consulted: ContextVar[set[tuple[str, int]] | None] = ContextVar("consulted", default=None)
_pinned: ContextVar[Mapping[str, Mapping[str, int]]] = ContextVar("pinned", default={})  # noqa: B039


@cache
def table() -> Mapping[str, Any]:
    return dict(json.loads(TABLE.read_text()))


def configuration(kernel: str, dtype: torch.dtype, size: int) -> dict[str, int]:
    """The settings of `kernel` for `dtype` and a size class; what `size` counts is the kernel's own affair."""
    if kernel in _pinned.get():
        return dict(_pinned.get()[kernel])
    name = str(dtype).removeprefix("torch.")
    for place, row in enumerate(table()[kernel]["rows"]):
        if name in row["dtypes"] and (row["up_to"] is None or size <= row["up_to"]):
            noted = _consulted.get()
            if noted is not None:
                noted.add((kernel, place))
            return dict(row["settings"])
    raise LookupError(f"[{kernel}] no configuration for {name}, size {size} in {TABLE.name}")


@contextmanager
def pinned(settings: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Within the block the kernels named in `settings` use these instead of the table: to tune, or to test a form."""
    token = _pinned.set({**_pinned.get(), **settings})
    try:
        yield
    finally:
        _pinned.reset(token)


@contextmanager
def consulted() -> Iterator[set[tuple[str, int]]]:
    """Within the block every row that `configuration` takes is added to the set: (kernel, place among its rows)."""
    rows: set[tuple[str, int]] = set()
    token = _consulted.set(rows)
    try:
        yield rows
    finally:
        _consulted.reset(token)
