"""What `volcast info --memory` says: the memory of an artifact's programs, foretold without running them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from . import footprint_onnxruntime, footprint_openvino
from .artifact import MANIFEST
from .atomic import sha256
from .host_memory import HostMemory
from .memory_limit import MemoryLimit
from .plan_memory import PlanMemory
from .plans import PLANS, Target, read_plans
from .sizes import latent_sizes
from .spec import ArtifactSpec

ENGINES = {"onnxruntime": footprint_onnxruntime.MEMORY, "openvino": footprint_openvino.MEMORY}
MIB = 2**20


def memory_rows(
    spec: ArtifactSpec, folder: Path, engine: str, size: Sequence[int] | None, batch: int, limit: int | None
) -> list[dict[str, Any]]:
    """Per engine and program: bytes held while it is open, and its peak; for slabs the least, or those within `limit`.

    Bytes are beyond what the process and the engine's library take; `limit` holds for all together. "auto" stands for
    both engines on the CPU. Those of TensorRT's engines are on the device, as its builder told them.
    Raises ValueError for an engine whose memory is not foretold, one without plans, a size that the artifact or a plan
    does not allow, a limit that is too low.
    """
    if engine not in ("auto", *ENGINES, *get_args(Target)):
        raise ValueError(
            f"[info] engine={engine}: memory is foretold for {', '.join(ENGINES)}, {' and '.join(get_args(Target))}"
        )
    _, axes = latent_sizes(spec, size, "info")
    sizes = {"batch": batch, "steps": spec.scheduler.steps, **axes}
    rows: list[dict[str, Any]] = []
    for name in ENGINES if engine == "auto" else (engine,):
        memory = _memory(spec, folder, name, limit)
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


def _memory(spec: ArtifactSpec, folder: Path, engine: str, limit: int | None) -> MemoryLimit:
    if engine in ENGINES:
        return HostMemory(folder, spec, ENGINES[engine], limit)
    digest = sha256(folder / MANIFEST)
    for path in sorted((folder / "engines").glob(f"{engine}*/{PLANS}")):
        plans = read_plans(path.parent)
        if plans.target == engine and plans.artifact == digest:
            return PlanMemory(folder, spec, path.parent, plans, limit)
    raise ValueError(
        f"[info] {folder} has no plans for {engine}; run `volcast build {folder} --target {engine}`"
    )


def memory_text(rows: Sequence[dict[str, Any]]) -> str:
    """The same for a reader, in MiB."""
    lines = [f"{'engine':<12} {'program':<24} {'held MiB':>9} {'peak MiB':>9} {'slabs':>6}"]
    for row in rows:
        held, peak = row["held"] / MIB, row["peak"] / MIB
        lines.append(
            f"{row['engine']:<12} {row['program']:<24} {held:>9.1f} {peak:>9.1f} {row['slabs'] or '':>6}"
        )
    return "\n".join(lines)
