"""Makes kernels/configurations.json: which tile, warps and stages each kernel is launched with.

    python -m volcast.benchmarks.tune             on a GPU: halve and double each setting while that is faster
    python -m volcast.benchmarks.tune --check     anywhere: compile what is pinned for every device, without a spill

The first writes the table, with the GPU's name as its basis. Rows that no case of `kernel_cases.py` reaches stay.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping
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
    """Each setting halved and doubled, one at a time. Stages and counts below 1 do not exist."""
    for name, value in settings.items():
        for other in (value // 2, value * 2):
            if other >= 1:
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


def rows_of(case: Case) -> list[tuple[str, int]]:
    """The table's rows that a case is launched with."""
    with consulted() as rows:
        case.launches(90)
    return sorted(rows)


def faults(case: Case, capability: int) -> list[str]:
    """What is wrong with the case's kernels on a device: spills, or no room for them."""
    found = []
    for launch in case.launches(capability):
        try:
            spills = compile_launch(launch, capability).spill_bytes
        except ValueError as error:
            found.append(str(error))
            continue
        if spills:
            found.append(f"{launch.name} on sm_{capability} spills {spills} bytes a thread")
    return found


def tuned(case: Case, settings: Mapping[str, Mapping[str, int]], kernel: str) -> tuple[Settings, float]:
    """The fastest settings of one kernel in a case, the other kernels as in `settings`."""
    from .timing_triton import gpu_ms

    fused, _ = case.subject(torch.device("cuda"))

    def milliseconds(candidate: Settings) -> float | None:
        with pinned({**settings, kernel: candidate}):
            if any(faults(case, capability) for capability in CAPABILITIES):
                return None
            return gpu_ms([fused], rounds=3)[0].median

    return search(dict(settings[kernel]), milliseconds)


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
    check: Annotated[bool, typer.Option(help="Only compile what is pinned, for every device.")] = False,
    case: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
) -> None:
    chosen = [one for one in CASES if case in one.name]
    if check:
        work = [(one, capability) for one in chosen for capability in CAPABILITIES]
        wrong = [
            f"{one.name}: {fault}"
            for one, capability in tqdm(work, desc="check", file=sys.stderr, disable=None)
            for fault in faults(one, capability)
        ]
        print(
            "\n".join(wrong) or f"{len(chosen)} cases compile for {len(CAPABILITIES)} devices without a spill"
        )
        raise typer.Exit(bool(wrong))
    if not torch.cuda.is_available():
        raise SystemExit("[tune] no GPU here: run with --check, or on the device to tune for")
    found = copy.deepcopy(dict(table()))
    for one in chosen:
        for kernel, place in rows_of(one):
            row = found[kernel]["rows"][place]
            settings = {name: found[name]["rows"][at]["settings"] for name, at in rows_of(one)}
            row["settings"], taken = tuned(one, settings, kernel)
            found[kernel]["basis"] = f"timed on {torch.cuda.get_device_name()}"
            print(f"{one.name}: {kernel} {row['settings']} {taken:.4f} ms")
            TABLE.write_text(as_json(found))


if __name__ == "__main__":
    typer.run(main)
