"""What `volcast info --memory` says: the memory of an artifact's programs, foretold for engines on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import footprint_onnxruntime, footprint_openvino
from .host_memory import HostMemory
from .sizes import latent_sizes
from .spec import ArtifactSpec

ENGINES = {"onnxruntime": footprint_onnxruntime.MEMORY, "openvino": footprint_openvino.MEMORY}
MIB = 2**20


def memory_rows(
    spec: ArtifactSpec, folder: Path, engine: str, size: Sequence[int] | None, batch: int, limit: int | None
) -> list[dict[str, Any]]:
    """Per engine and program: bytes held while it is open, and its peak; for slabs the least, or those within `limit`.

    Bytes are beyond what the process and the engine's library take; `limit` holds for all together.
    Raises ValueError for an engine whose memory is not foretold, a size that the artifact does not allow, a limit that
    is too low.
    """
    if engine not in ("auto", *ENGINES):
        raise ValueError(f"[info] engine={engine}: memory is foretold for {' and '.join(ENGINES)}")
    _, axes = latent_sizes(spec, size, "info")
    sizes = {"batch": batch, "steps": spec.scheduler.steps, **axes}
    rows: list[dict[str, Any]] = []
    for name in ENGINES if engine == "auto" else (engine,):
        memory = HostMemory(folder, spec, ENGINES[name], limit)
        for program in ("schedule", "prepare", "step", "decode"):
            if program in spec.programs:
                found = memory.footprint(program, sizes)
                rows.append(
                    {"engine": name, "program": program, "held": found.held, "peak": found.peak, "slabs": 0}
                )
        if spec.slabs is not None:
            least = memory.plan_slabs(sizes, 0)
            rows.append({"engine": name, "program": "decode in slabs, least", "held": 0, "peak": int(least.peak),
                         "slabs": memory.count_slabs(sizes, least.passes)})  # fmt: skip
        if limit is not None and "decode" in spec.programs:
            opened = [
                (program, sizes) for program in ("schedule", "prepare", "step") if program in spec.programs
            ]
            plan = memory.plan_decode(sizes, opened)
            rows.append({"engine": name, "program": "decode within the limit", "held": 0, "peak": plan.peak,
                         "slabs": plan.slabs})  # fmt: skip
    return rows


def memory_text(rows: Sequence[dict[str, Any]]) -> str:
    """The same for a reader, in MiB."""
    lines = [f"{'engine':<12} {'program':<24} {'held MiB':>9} {'peak MiB':>9} {'slabs':>6}"]
    for row in rows:
        held, peak = row["held"] / MIB, row["peak"] / MIB
        lines.append(
            f"{row['engine']:<12} {row['program']:<24} {held:>9.1f} {peak:>9.1f} {row['slabs'] or '':>6}"
        )
    return "\n".join(lines)
