"""What `volcast build --target cuda` says about the device programs that it made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx

from volcast.runtime.artifact import read_artifact
from volcast.runtime.device.memory import is_view
from volcast.runtime.device.program import WEIGHTS, DevicePrograms


def as_text(programs: DevicePrograms, folder: Path, artifact: Path | None = None) -> str:
    """Each program's operations by kind, as ONNX has them and as the device runs them; `folder` holds the programs.

    `artifact` is what they were made from, left out: two folders up.
    """
    source = folder.parent.parent if artifact is None else artifact
    files = read_artifact(source).programs
    lines = []
    for name, program in programs.programs.items():
        before = Counter(
            node.op_type for node in onnx.load(source / files[name].file, load_external_data=False).graph.node
        )
        views = sum(is_view(program, one) for one in program.operations)
        launched = Counter[str](one.kind for one in program.operations if not is_view(program, one))
        lines.append(
            f"{name}: {before.total()} ONNX operators, {launched.total()} launched operations, {views} views"
        )
        lines.append(f"  ONNX    {_listed(before)}")
        lines.append(f"  device  {_listed(launched)}")
    size = (folder / WEIGHTS).stat().st_size
    lines.append(f"{folder}: {programs.name} in {programs.precision}, weights {size / 2**20:.1f} MiB")
    return "\n".join(lines)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
