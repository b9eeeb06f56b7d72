"""`volcast heal`. Heavy imports stand inside the functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .engine_name import EngineName


def heal(
    artifact: Annotated[Path, typer.Argument(help="Folder of a token model, as `volcast export` wrote it.")],
    image: Annotated[Path, typer.Argument(help="NIfTI file, with the intensities of training.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="NIfTI file: |image - healed| where tokens were replaced.")
    ] = Path("anomaly.nii.gz"),
    healed: Annotated[Path | None, typer.Option(help="NIfTI file: the healed image.")] = None,
    quantile: Annotated[
        float, typer.Option(help="Tokens whose log p lies below this quantile of the image's are replaced.")
    ] = 0.03,
    condition: Annotated[
        list[str] | None, typer.Option("--condition", "-c", help="As in `volcast sample`; repeatable.")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="What runs the networks.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Replace what a token model finds unlikely in an image, and map where and how much the image differs."""
    from .artifact import read_manifest
    from .condition_text import files_of, parse_conditions
    from .sample_output import check_apart, output_files
    from .token_model import load_tokens
    from .volume import Volume, read_nifti

    outputs = [output, *([] if healed is None else [healed])]
    for path in outputs:
        output_files(path, 1, None)
    check_apart(outputs, [image, *files_of(condition or ())])
    given = read_nifti(image)
    model = load_tokens(artifact, read_manifest(artifact), engine, threads)
    found = model.heal(given, quantile=quantile, condition=parse_conditions(model.spec, condition or ()))
    written = {output: ("anomaly", found.difference)}
    if healed is not None:
        written[healed] = ("healed", found.image)
    for path, (what, values) in written.items():
        volume = Volume(values.reshape(given.array.shape), given.affine, given.spacing_mm)
        volume.save(path, f"volcast {model.spec.name} {what}")
    replaced, total = int(found.masked.sum()), found.masked.size
    if as_json:
        typer.echo(json.dumps({"path": str(output), "replaced": replaced, "tokens": total}))
    else:
        typer.echo(f"{output}: {replaced} of {total} tokens replaced")
