"""What a build of TensorRT plans made, as text."""

from __future__ import annotations

from pathlib import Path

from volcast.runtime.plans import PlanManifest


def as_text(plans: PlanManifest, folder: Path) -> str:
    """One line a program: the bytes of its plan and the sizes that it takes; then where they lie and what for."""
    lines = []
    segments = [plan.bytes for name, plan in plans.programs.items() if name.startswith("decode_")]
    for name, plan in plans.programs.items():
        if name.startswith("decode_"):
            continue
        ranges = ", ".join(f"{axis} {one}" for axis, one in plan.ranges.items())
        stripped = f", {len(plan.weights)} weights left in the artifact" if plan.skeleton else ""
        lines.append(f"{name:8s} {plan.bytes / 2**20:7.1f} MiB  {ranges}{stripped}")
    if segments:
        lines.append(f"{'slabs':8s} {sum(segments) / 2**20:7.1f} MiB  decode in {len(segments)} segments")
    built = ", ".join(f"{one // 10}.{one % 10}" for one in plans.capabilities)
    on = f" on {plans.gpu}" if plans.gpu else ""
    lines.append(
        f"{folder}: {plans.name} in {plans.precision.value} by {plans.target} {plans.version}{on}, for {built}"
    )
    return "\n".join(lines)
