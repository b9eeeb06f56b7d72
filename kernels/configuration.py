"""Pinned launch configurations: a committed table, not a search at start-up.

`configurations.json` maps a kernel to rows; the first row that lists the dtype and whose `up_to` holds the size class
is taken. `benchmarks/tune.py` makes the table and writes into `basis` what it was judged by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("configurations.json")


@cache
def table() -> Mapping[str, Any]:
    return dict(json.loads(TABLE.read_text()))


def configuration(kernel: str, dtype: torch.dtype, size: int) -> dict[str, int]:
    """The settings of `kernel` for `dtype` and a size class; what `size` counts is the kernel's own affair."""
    name = str(dtype).removeprefix("torch.")
    for row in table()[kernel]["rows"]:
        if name in row["dtypes"] and (row["up_to"] is None or size <= row["up_to"]):
            return dict(row["settings"])
    raise LookupError(f"[{kernel}] no configuration for {name}, size {size} in {TABLE.name}")
