"""Makes kernels/configurations.json: which tile, warps and stages each kernel is launched with.

    python -m volcast.benchmarks.tune [--case TEXT]

On a GPU it halves and doubles each setting while that is faster, and still compiles for every device without a spill.
The GPU's name is the row's basis. A row is judged by all cases of `kernel_cases.py` that it changes; rows that none
reaches stay.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from statistics import geometric_mean
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from volcast.kernels.compile_triton import CAPABILITIES, compile_launch
from volcast.kernels.configuration import TABLE, consulted, pinned, table

from .kernel_cases import CASES, Case

Settings = dict[str, int]
BETTER = 0.98
"""A change is kept when it takes at most this share of the time: below it lies noise."""


def neighbours(settings: Settings) -> Iterator[Settings]:
    """Each setting halved and doubled, one at a time. What is below 1 does not exist, nor a block of over 32 warps."""
    for name, value in settings.items():
        for other in (value // 2, value * 2):
            if other >= 1 and not ("warps" in name and other > 32):
                yield {**settings, name: other}


def search(start: Settings, milliseconds: Callable[[Settings], float | None]) -> tuple[Settings, float]:
    """The settings that no neighbour beats; None from `milliseconds` is a candidate that does not run."""
    best, fastest = start, milliseconds(start)
    if fastest is None:
        raise ValueError(f"[tune] the pinned settings {start} do not run")
    tried = [start]
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(best):
            if candidate in tried:
                continue
            tried.append(candidate)
            taken = milliseconds(candidate)
            if taken is not None and taken < BETTER * fastest:
                best, fastest, improved = candidate, taken, True
                break
    return best, fastest


Row = tuple[str, int]
"""A kernel's name in the table, and the place among its rows."""


def rows_of(case: Case, capability: int) -> list[Row]:
    """The table's rows that change how a case is launched on a device. A threshold that it lies far from is none."""
    with consulted() as rows:
        usual = _form(case, capability)
    found = []
    for kernel, place in sorted(rows):
        for other in neighbours(table()[kernel]["rows"][place]["settings"]):
            with pinned({kernel: other}):
                if _form(case, capability) != usual:
                    found.append((kernel, place))
                    break
    return found


def _form(case: Case, capability: int) -> list[Any]:
    return [(one.name, one.grid, one.constants, one.options()) for one in case.launches(capability)]


def spills(case: Case, capability: int) -> bool:
    """Whether one of the case's kernels does on a device. Raises ValueError where it has no room for them."""
    return any(compile_launch(launch, capability).spill_bytes for launch in case.launches(capability))


def tuned(cases: list[Case], kernel: str, start: Settings) -> tuple[Settings, float]:
    """The settings of one kernel with the smallest geometric mean of milliseconds over the cases that it is in."""
    from .timing_triton import gpu_ms

    fused = [case.subject(torch.device("cuda"))[0] for case in cases]

    def milliseconds(candidate: Settings) -> float | None:
        with pinned({kernel: candidate}):
            try:
                if any(spills(case, capability) for case in cases for capability in CAPABILITIES):
                    return None
                return geometric_mean([one.median for one in gpu_ms(list(fused), rounds=3)])
            except ValueError:  # no room for it, here or on another device
                return None

    return search(start, milliseconds)


def as_json(rows: Mapping[str, Any]) -> str:
    """The table's text: one row a line, so that a change of one shows as one line."""
    kernels = []
    for kernel, entry in rows.items():
        lines = ",\n".join(f"      {json.dumps(row)}" for row in entry["rows"])
        head = "".join(
            f"    {json.dumps(key)}: {json.dumps(entry[key])},\n" for key in entry if key != "rows"
        )
        kernels.append(f'  {json.dumps(kernel)}: {{\n{head}    "rows": [\n{lines}\n    ]\n  }}')
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def main(
    case: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
) -> None:
    chosen = [one for one in CASES if case in one.name]
    if not torch.cuda.is_available():
        raise SystemExit("[tune] no GPU here: run it on the device to tune for")
    major, minor = torch.cuda.get_device_capability()
    users: dict[Row, list[Case]] = {}
    for one in chosen:
        for row in rows_of(one, 10 * major + minor):
            users.setdefault(row, []).append(one)
    found = copy.deepcopy(dict(table()))
    for (kernel, place), cases in tqdm(users.items(), desc="tune", file=sys.stderr, disable=None):
        row = found[kernel]["rows"][place]
        with torch.no_grad():
            row["settings"], taken = tuned(cases, kernel, row["settings"])
        row["basis"] = f"timed on {torch.cuda.get_device_name()}"
        print(f"{kernel} {row['settings']} {taken:.4f} ms over {len(cases)} cases")
        TABLE.write_text(as_json(found))


if __name__ == "__main__":
    typer.run(main)
