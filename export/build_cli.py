"""The command `build`: an artifact for GPUs that need not be here; what builds is imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from tqdm import tqdm

from volcast.runtime.plans import Compatibility, Target
from volcast.runtime.spec import Precision


def build(
    artifact: Annotated[
        Path | None, typer.Argument(help="Folder of an artifact; left out: the bundled hippocampus model.")
    ] = None,
    target: Annotated[
        Literal["cuda", "cubin", "tensorrt", "tensorrt-rtx"],
        typer.Option(
            help="cuda: programs for --engine cuda; cubin: our kernels, compiled ahead of time; tensorrt: plans for the "
            "GPU that is here; tensorrt-rtx: plans for --sm, which need no GPU."
        ),
    ] = ...,  # type: ignore[assignment]
    sm: Annotated[
        list[str],
        typer.Option(
            help="cubin, tensorrt-rtx: compute capability of the device, 87 or 8.7 for Jetson Orin; repeatable."
        ),
    ] = [],  # noqa: B006
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder; left out: beside the others in ARTIFACT/engines."),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="What the device computes on; sums are float32.")
    ] = Precision.FP16,
    batch: Annotated[
        str | None, typer.Option(help="Samples a call. tensorrt: 1:8 where left out; cubin: 1.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Latent sizes, as 8,12,8; left out: the artifact's. tensorrt: also smallest:tuned:largest, as "
            "4,4,4:8,12,8:16,16,16."
        ),
    ] = None,
    compatibility: Annotated[
        Literal["none", "same-capability", "ampere-plus"],
        typer.Option(help="tensorrt: further GPUs that the plans run on; costs speed."),
    ] = "none",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="tensorrt: plans for later versions of it too.")
    ] = False,
    strip: Annotated[
        bool,
        typer.Option("--strip", help="tensorrt: leave the weights in the artifact until a plan is loaded."),
    ] = False,
    force: Annotated[bool, typer.Option(help="Replace what was built before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Prepare an artifact for GPUs that need not be here (TensorRT: for the one that is)."""
    from volcast.runtime.default_artifact import default_artifact

    plans = compatibility != "none" or version_compatible or strip
    if target == "cuda" and (sm or batch is not None or size is not None or output is not None):
        raise ValueError(
            "[build] --sm, --batch, --size and --output are for other targets: device programs hold for every GPU, "
            "batch and size, and lie in ARTIFACT/engines/cuda"
        )
    if plans and target in ("cuda", "cubin"):
        raise ValueError(
            "[build] --compatibility, --version-compatible and --strip are for --target tensorrt"
        )
    capabilities = [_capability(text) for text in sm]
    folder = default_artifact() if artifact is None else artifact
    if target == "cuda":
        _cuda(folder, precision, force, as_json)
    elif target == "cubin":
        _cubin(folder, output, capabilities, precision, batch, size, force, as_json)
    else:
        _tensorrt(
            folder, target, output, capabilities, precision, batch, size, compatibility, version_compatible, strip,
            force, as_json,
        )  # fmt: skip


def _cuda(artifact: Path, precision: Precision, force: bool, as_json: bool) -> None:
    from .cuda_report import as_text
    from .to_cuda import build_cuda

    place = artifact / "engines" / "cuda"
    if place.exists() and not force:
        raise ValueError(f"[build] {place} exists: remove it, or pass --force")
    with _bar("program") as on_program:
        built = build_cuda(artifact, precision=precision, replace=force, progress=on_program)
    print(built.model_dump_json() if as_json else as_text(built, place))


def _cubin(
    artifact: Path, output: Path | None, capabilities: list[int], precision: Precision, batch: str | None,
    size: str | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    from volcast.runtime.sizes import parse_sizes

    from .cubin_report import as_table
    from .to_cubin import build_cubins

    latent = parse_sizes("build", size)
    if batch is not None and not batch.isdecimal():
        raise ValueError(f"[build] --batch {batch!r}: need one number for cubins")
    place = artifact / "engines" / "cubin" if output is None else output
    if place.exists() and not force:
        raise ValueError(f"[build] {place} exists: remove it, choose another name, or pass --force")
    with _bar("cubin") as on_cubin:
        manifest = build_cubins(
            artifact,
            place,
            capabilities,
            precision=precision,
            batch=1 if batch is None else int(batch),
            size=latent,
            replace=force,
            progress=on_cubin,
        )
    print(manifest.model_dump_json() if as_json else as_table(manifest, place))


def _tensorrt(
    artifact: Path, target: Target, output: Path | None, capabilities: list[int], precision: Precision,
    batch: str | None, size: str | None, compatibility: Compatibility, version_compatible: bool, strip: bool,
    force: bool, as_json: bool,
) -> None:  # fmt: skip
    from .tensorrt_profile import parse_batch, parse_size
    from .tensorrt_report import as_text
    from .to_tensorrt import build_tensorrt

    with tqdm(
        desc="build", file=sys.stderr, disable=None, bar_format="{l_bar}{bar}| {elapsed} {postfix}"
    ) as bar:

        def on_phase(program: str, phase: str, done: int, total: int) -> None:
            bar.set_postfix_str(f"{program}: {phase}", refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        place, manifest = build_tensorrt(
            artifact,
            target,
            output,
            capabilities=capabilities,
            precision=precision,
            batch=None if batch is None else parse_batch(batch),
            size=None if size is None else parse_size(size),
            compatibility=compatibility,
            version_compatible=version_compatible,
            strip=strip,
            replace=force,
            progress=on_phase,
        )
    print(manifest.model_dump_json() if as_json else as_text(manifest, place))


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    with tqdm(desc="build", unit=unit, file=sys.stderr, disable=None) as bar:

        def on_one(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_one


def _capability(text: str) -> int:
    digits = text.removeprefix("sm_").replace(".", "")
    if not (digits.isascii() and digits.isdecimal()):
        raise ValueError(f"[build] --sm {text!r}: need a compute capability such as 87 or 8.7")
    return int(digits)
