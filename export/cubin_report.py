"""What `volcast build` says about the kernels that it compiled."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from volcast.runtime.cubins import CubinManifest, KernelSpec


def as_table(manifest: CubinManifest, folder: Path) -> str:
    """One row a kernel and device: registers a thread, spilled bytes a thread, shared memory a block."""
    uses = Counter(
        (launch.kernel, sm)
        for use in manifest.uses
        for sm, launches in use.launches.items()
        for launch in launches
    )
    rows = [
        (kernel.kernel, _constants(kernel), str(uses[key, sm]), sm, str(cubin.registers), str(cubin.spill_bytes),
         f"{cubin.shared_bytes / 1024:.1f}")
        for key, kernel in manifest.kernels.items()
        for sm, cubin in kernel.files.items()
    ]  # fmt: skip
    head = ("kernel", "constants", "launches", "device", "registers", "spill B", "shared KiB")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    files = [cubin.file for kernel in manifest.kernels.values() for cubin in kernel.files.values()]
    size = sum((folder / file).stat().st_size for file in files)
    lines.append(
        f"{folder}: {len(manifest.kernels)} kernels, {len(files)} cubins, {size / 2**20:.1f} MiB, for "
        f"{sum(use.left_out is None for use in manifest.uses)} operations of {manifest.name} in {manifest.precision}, batch {manifest.batch}"
    )
    lines += [
        f"no kernel for {use.operation} {use.node}: {use.left_out}" for use in manifest.uses if use.left_out
    ]
    return "\n".join(lines)


def _constants(kernel: KernelSpec) -> str:
    """The constants that tell instances apart, shortened."""
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in kernel.constants.items()
        if value is not None and name != "EPS"
    )
