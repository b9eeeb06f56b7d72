"""The command `quantize`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm


def quantize(
    artifact: Annotated[
        Path | None, typer.Argument(help="Folder of an artifact; left out: the bundled hippocampus model.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the int8 artifact.")] = ...,  # type: ignore[assignment]
    samples: Annotated[
        int, typer.Option(help="To calibrate on, each with a seed and condition of its own.")
    ] = 8,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps of each; left out: the model's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first sample.")] = 1,
    decode: Annotated[bool, typer.Option(help="The decoder in int8 too.")] = True,
    condition: Annotated[
        list[str],
        typer.Option(
            "--condition", "-c", help="For all samples, as in `volcast sample`; else drawn. Repeatable."
        ),
    ] = [],  # noqa: B006
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    force: Annotated[bool, typer.Option(help="Replace the artifact in OUTPUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Write an artifact again with most of its layers in int8, calibrated on its own samples."""
    if output.exists() and not force:
        raise ValueError(f"[quantize] {output} exists: remove it, choose another name, or pass --force")
    from volcast.runtime.artifact import read_artifact
    from volcast.runtime.condition_text import parse_conditions
    from volcast.runtime.default_artifact import default_artifact

    from .quantize import quantize as write

    folder = default_artifact() if artifact is None else artifact
    before = read_artifact(folder)
    given = parse_conditions(before, condition)
    with tqdm(desc="calibrate", unit="step", file=sys.stderr, disable=None, leave=False) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        spec = write(
            folder,
            output,
            samples=samples,
            steps=steps,
            seed=seed,
            decode=decode,
            condition=given,
            threads=threads,
            replace=force,
            on_step=on_step,
        )
    if as_json:
        print(spec.model_dump_json())
        return
    sizes = [sum((place / name).stat().st_size for name in each.files) / 1e6
             for place, each in ((folder, before), (output, spec))]  # fmt: skip
    print(
        f"{output}: {spec.name}, int8 layers: {spec.provenance['quantization_layers']}; {sizes[1]:.1f} MB (was {sizes[0]:.1f})"
    )
    print(f"  volcast verify {output} --against {folder}    # what it costs")
