"""The command `pack`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from tqdm import tqdm

from volcast.runtime.pack import PackTarget

STAGES = ["check", "core", "copy", "wheel", "digests", "read back", "tar"]


def pack(
    artifact: Annotated[
        Path | None, typer.Argument(help="Folder of an artifact; left out: the bundled hippocampus model.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder, or file that ends in .tar.")] = ...,  # type: ignore[assignment]
    target: Annotated[
        PackTarget,
        typer.Option(help="What is to run it: cpu (ONNX Runtime), openvino, engines built before, or cubin."),
    ] = "cpu",
    platform: Annotated[
        Literal["x86_64", "aarch64"] | None,
        typer.Option(help="Machine to pack for; left out: this one. Another: pip install ziglang."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace the pack in OUTPUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the pack's manifest as JSON.")] = False,
) -> None:
    """Pack an artifact for a device: programs, engines, pinned requirements and volcast's wheel, all with digests."""
    from volcast.runtime.default_artifact import default_artifact

    from .pack import pack as write
    from .pack_targets import TARGETS

    with tqdm(total=len(STAGES), desc="pack", unit="stage", file=sys.stderr, disable=None) as bar:

        def progress(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update(STAGES.index(stage) - bar.n)

        folder = default_artifact() if artifact is None else artifact
        manifest = write(folder, output, target, machine=platform, replace=force, progress=progress)
    if as_json:
        print(manifest.model_dump_json())
        return
    name = output.stem if output.suffix == ".tar" else output.name
    engine = TARGETS[target].engine
    print(f"{output}: {manifest.as_text()}; on the device, with Python {manifest.python}:")
    print(f"  tar -xf {output.name}" if output.suffix == ".tar" else f"  copy {output.name} there")
    print(
        f"  python{manifest.python} -m venv env && env/bin/pip install -r {name}/requirements.txt {name}/wheels/*.whl"
    )
    print(f"  env/bin/volcast info {name}")
    if engine:
        print(f"  env/bin/volcast sample {name}/artifact --engine {engine} -o sample.nii.gz")
