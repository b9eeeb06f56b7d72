"""`volcast request`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import image_cli
from .cli import Conditions, Negative, Scheduler, Steps, Temperature, TopK, TopP, Weights, progress


def request(
    output: Annotated[Path, typer.Option("--output", "-o", help="NIfTI file to write.")] = Path(
        "sample.nii.gz"
    ),
    server: Annotated[str, typer.Option(help="Host and port of its gRPC.")] = "127.0.0.1:8001",
    model: Annotated[str | None, typer.Option(help="Its name there; left out: the only one.")] = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="Volumes; above 1: OUTPUT_0, OUTPUT_1, ...")
    ] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Sample i takes its noise from (seed, i); left out: drawn.")
    ] = None,
    steps: Steps = None,
    scheduler: Scheduler = None,
    guidance: Weights = None,
    condition: Conditions = None,
    negative: Negative = None,
    size: Annotated[str | None, typer.Option(help="Latent sizes, as 8,12,8.")] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="NIfTI file to start from (image to image), or whose style a one-pass model takes."
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --image: how far it is noised, up to 1.")
    ] = None,
    inpaint: image_cli.Mask = None,
    resamples: image_cli.Resamples = None,
    jump_length: image_cli.JumpLength = None,
    paste: image_cli.Paste = True,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    priority: Annotated[
        int,
        typer.Option(
            help="-8..8, each level doubles the share (token and one-pass models: higher ones first)."
        ),
    ] = 0,
    timeout: Annotated[
        float | None,
        typer.Option(min=1e-3, help="Seconds, after which the request is given up; left out: none."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Ask a server for volumes and write them as NIfTI."""
    from .client import Client
    from .condition_text import files_of, parse_conditions, parse_weights
    from .sample_output import check_apart, output_files
    from .sizes import parse_sizes
    from .volume import read_nifti

    weights = parse_weights(guidance)
    outputs = output_files(output, count, None, weights if isinstance(weights, list) else ())
    images = [path for path in (image, inpaint) if path is not None]
    check_apart(outputs, [*images, *files_of((*(condition or ()), *(negative or ())))])
    given: dict[str, Any] = {
        "steps": steps,
        "scheduler": scheduler,
        "guidance": weights,
        "strength": strength,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "negative": parse_conditions(None, negative or ()) or None,
        "inpaint": image_cli.read_inpaint(image, inpaint, resamples, jump_length, paste),
    }
    start = None if image is None else read_nifti(image)
    with Client(server, model) as client, progress(shown=not quiet and sys.stderr.isatty()) as on_step:
        volumes = client.sample_many(
            count, seed, condition=parse_conditions(None, condition or ()), size=parse_sizes("request", size), image=start,
            priority=priority, timeout_s=timeout, on_step=None if quiet else on_step, **given,
        )  # fmt: skip
    for path, volume in zip(outputs, volumes, strict=True):
        volume.save(path)
        typer.echo(f"{path}: {' x '.join(str(one) for one in volume.array.shape)}")
