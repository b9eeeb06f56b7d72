"""How fast are the kernels beside the best PyTorch way to write them? And what did the compiler make of them?

    python -m volcast.benchmarks.kernels [--case TEXT] [--sm 90 ...] [-o results/kernels.jsonl]

On a GPU every case is timed in turns with its peers, after a comparison of results. Anywhere, each kernel is compiled
for every device asked for, and its registers, spills and shared memory stand beside the roofline of the case.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from volcast.kernels.compile_triton import CAPABILITIES, compile_launch

from .bench import environment
from .kernel_cases import CASES, Case
from .kernel_report import as_markdown

ROUNDS = 5
TELLING = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "LDL", "STL")
"""Machine instructions worth a note: tensor cores, asynchronous copies, spills."""


def resources(case: Case, capabilities: list[int]) -> list[dict[str, Any]]:
    """What each of the case's kernels takes on each device."""
    found = []
    for capability in capabilities:
        seen = set()
        for launch in case.launches(capability):
            cubin = compile_launch(launch, capability)
            if cubin.sha256 in seen:
                continue
            seen.add(cubin.sha256)
            found.append({
                "kernel": launch.name, "sm": capability, "threads": cubin.threads, "registers": cubin.registers,
                "spill_bytes": cubin.spill_bytes, "shared_bytes": cubin.shared_bytes,
                "instructions": sorted(cubin.opcodes().intersection(TELLING)),
            })  # fmt: skip
    return found


def timed(case: Case, device: torch.device) -> dict[str, Any]:
    """Milliseconds of the fused call and its peers, in turns. Raises ValueError where they disagree."""
    from .timing_triton import gpu_ms

    torch.manual_seed(0)
    torch._dynamo.reset()  # or the graphs of one case serve the next one, with dynamic shapes
    torch.backends.cudnn.benchmark = True
    with torch.no_grad():
        fused, peers = case.subject(device)
        mine = fused().float()
        first = next(iter(peers))
        other = peers[first]().float()
        error = float((mine - other).norm() / other.norm())
        if case.comparable is not None and not error < case.comparable:
            raise ValueError(f"[bench] {case.name}: differs from {first} by {error:.3g} (relative L2)")
        del mine, other
        statistics = gpu_ms([fused, *peers.values()], ROUNDS)
    names = ["volcast", *peers]
    return {
        "gpu": torch.cuda.get_device_name(device),
        "error_to_first_peer": error,
        "ms": {name: one.as_dict() for name, one in zip(names, statistics, strict=True)},
    }


def main(
    case: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    sm: Annotated[list[int], typer.Option(help="Compute capabilities to compile for.")] = list(CAPABILITIES),  # noqa: B006
    compile_only: Annotated[bool, typer.Option(help="Time nothing, GPU or not.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the results here, a JSON line a case.")
    ] = None,
) -> None:
    chosen = [one for one in CASES if case in one.name]
    device = torch.device("cuda") if torch.cuda.is_available() and not compile_only else None
    here = environment(threads=torch.get_num_threads())
    lines: list[dict[str, Any]] = []
    if output is not None:
        output.write_text("")
    for one in tqdm(chosen, desc="kernels", unit="case", file=sys.stderr, disable=None):
        lines.append({
            "case": one.name, "operation": one.operation, "dtype": "float16", "reach_ms": one.reach_ms,
            "cost": asdict(one.cost), "roofline_ms": one.cost.roofline_ms(),
            "timed": None if device is None else timed(one, device), "resources": resources(one, sm),
            "environment": here,
        })  # fmt: skip
        if output is not None:
            with output.open("a") as stream:  # a later case that fails takes no result along
                stream.write(json.dumps(lines[-1]) + "\n")
    print(as_markdown(lines))


if __name__ == "__main__":
    typer.run(main)
