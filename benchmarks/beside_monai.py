"""Calls beside MONAI's, in turns: the figures of a result's line, and the cases of a benchmark one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer
from torch import nn

from .bench import measure, paired_ratios, summarize
from .report import append

MONAI = "MONAI eager"
Network = TypeVar("Network", bound=nn.Module)


def randomised(network: Network) -> Network:
    """Weights N(0, 1 / fan-in), norm scales about 1, biases about 0: a fresh UNet of MONAI's makes zeros."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = drawn * parameter[0].numel() ** -0.5
        else:
            parameter.data = float(name.endswith("weight")) + 0.05 * drawn
    return network.eval().requires_grad_(False)


def in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, *, warmup: int = 3, key: str = "ms"
) -> dict[str, Any]:
    """Milliseconds of each call under `key`, and `MONAI`'s over each other's, round by round."""
    seconds = dict(zip(calls, measure(list(calls.values()), warmup=warmup, repeats=repeats), strict=True))
    return {
        key: {name: summarize([1e3 * one for one in taken]).as_dict() for name, taken in seconds.items()},
        "monai_over_volcast": {
            name: paired_ratios(seconds[MONAI], taken).as_dict() for name, taken in seconds.items() if name != MONAI
        },
    }  # fmt: skip


def run_cases(
    names: Iterable[str], case: Callable[[str], dict[str, Any]], output: Path | None, *, key: str = "ms"
) -> None:
    """Print each case's line, and add it to the JSON lines in `output`."""
    for name in names:
        row = case(name)
        for contestant, found in row[key].items():
            ratio = row["monai_over_volcast"].get(contestant)
            over = f", MONAI takes {ratio['median']:.2f} times as long" if ratio else ""
            typer.echo(
                f"{name:<13} {contestant:<37} {found['median']:.2f} ms ({found['minimum']:.2f}..{found['maximum']:.2f}){over}"
            )
        if output is not None:
            append(output, row)
