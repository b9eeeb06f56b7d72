"""`volcast anomaly`. Heavy imports stand inside the function."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .engine_name import EngineName


def anomaly(
    artifact: Annotated[
        Path, typer.Argument(help="Folder that `volcast export` wrote, of a diffusion model.")
    ],
    image: Annotated[Path, typer.Argument(help="NIfTI file with the intensities of training.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="NIfTI file of the map |x - x_hat|.")] = Path(
        "anomaly.nii.gz"
    ),
    reconstruction: Annotated[Path | None, typer.Option(help="NIfTI file of x_hat.")] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option("--condition", "-c", help="Of health, for the way back; as in `volcast sample`."),
    ] = None,
    observed: Annotated[
        list[str] | None,
        typer.Option(help="Condition on the way to noise; left out: the null context. Repeatable."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the whole way; left out: the model's own.")] = None,
    strength: Annotated[float, typer.Option(help="How far the image is taken to noise, up to 1.")] = 0.5,
    guidance: Annotated[float | None, typer.Option(help="Of the way back: classifier-free.")] = None,
    label: Annotated[
        int | None, typer.Option(help="Of the way back: class that the artifact's classifier pulls to.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="With --label: how hard; left out: 6.")] = None,
    engine: Annotated[EngineName, typer.Option(help="What runs the networks: a CPU engine.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Map what is unlike health in an image: to noise by DDIM backwards, back under guidance, |x - x_hat|."""
    from .artifact import read_artifact
    from .cli import progress
    from .condition_text import files_of, parse_conditions
    from .pipeline import load
    from .sample_output import check_apart, output_files
    from .volume import read_nifti

    outputs = [output, *([] if reconstruction is None else [reconstruction])]
    for path in outputs:
        output_files(path, 1, None)
    check_apart(outputs, [image, *files_of((*(condition or ()), *(observed or ())))])
    spec = read_artifact(artifact)
    healthy = parse_conditions(spec, condition or ())
    shown = None if observed is None else parse_conditions(spec, observed)
    volume = read_nifti(image)
    model = load(artifact, engine, threads)
    with progress(shown=sys.stderr.isatty() or not as_json) as on_step:
        found = model.anomaly(
            volume, on_step, condition=healthy, observed=shown, steps=steps, strength=strength, guidance=guidance,
            label=label, scale=scale,
        )  # fmt: skip
    for path, one in zip(outputs, (found.map, found.reconstruction), strict=False):
        one.save(path, f"volcast {model.spec.name} anomaly")
    mean, largest = float(found.map.array.mean()), float(found.map.array.max())
    if as_json:
        typer.echo(json.dumps({"path": str(output), "steps": found.steps, "mean": mean, "max": largest}))
    else:
        typer.echo(
            f"{output}: {found.steps} steps each way, |x - x_hat| {mean:.4g} in the mean, {largest:.4g} at most"
        )
