"""`volcast sample` and `volcast info`. Heavy imports stand inside the functions: `--help` must be quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import image_cli
from .engine_name import EngineName

Artifact = Annotated[
    Path | None,
    typer.Argument(help="Folder written by `volcast export`; left out: the bundled hippocampus model."),
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; left out: the model's own.")]
Scheduler = Annotated[
    Literal["ddim", "ddpm", "pndm", "dpm-solver++", "rflow"] | None,
    typer.Option(help="Left out: the model's own."),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Weight of classifier-free guidance; left out: the condition alone, half the network calls."
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Weight of classifier-free guidance; 1..10 or 1,2.5,7: a volume for each, OUTPUT_guidance1, .. "
        "Left out: the condition alone, half the network calls."
    ),
]
Temperature = Annotated[float | None, typer.Option(help="Token models: above 0; left out: 1.")]
TopK = Annotated[int | None, typer.Option(help="Token models: of the k most probable codes.")]
TopP = Annotated[float | None, typer.Option(help="Token models: of the fewest codes of this sum.")]
Conditions = Annotated[
    list[str] | None,
    typer.Option(
        "--condition", "-c", help="name=0.5, name=0.5,0.2 or name=@FILE (.npy, .nii.gz); repeatable."
    ),
]
Negative = Annotated[
    list[str] | None,
    typer.Option(help="As --condition, for guidance's other branch (a negative prompt); repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def sample(
    artifact: Artifact = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="NIfTI file; left out: sample.nii.gz, with --mean or --variance none."
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", "-n", help="Volumes; above 1: OUTPUT_0, OUTPUT_1, ...")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Sample i takes its noise from (seed, i).")] = 0,
    steps: Steps = None,
    scheduler: Scheduler = None,
    spacing: Annotated[
        Literal["leading", "linspace", "trailing"] | None, typer.Option(help="Spacing of the timesteps.")
    ] = None,
    eta: Annotated[float, typer.Option(help="DDIM's noise, 0..1.")] = 0.0,
    reuse: Annotated[
        int, typer.Option(help="The whole network at every k-th step alone; needs `volcast export --reuse`.")
    ] = 1,
    guidance: Weights = None,
    label: Annotated[
        int | None,
        typer.Option(help="Class, from 0, to which the artifact's classifier pulls (docs/anomaly.md)."),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="With --label: how hard; left out: 6.")] = None,
    condition: Conditions = None,
    negative: Negative = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="NIfTI label map, or NAME=FILE; without ARTIFACT: the bundled model with its ControlNet."
        ),
    ] = None,
    then: Annotated[
        list[str] | None,
        typer.Option(
            help="FOLDER of an upscaler for the samples, or FOLDER,steps=20,noise_level=10; repeatable, in turn."
        ),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Latent sizes, as 8,12,8.")] = None,
    image: Annotated[Path | None, typer.Option(help="NIfTI file to start from (image to image).")] = None,
    strength: Annotated[float, typer.Option(help="With --image: how far it is noised, up to 1.")] = 1.0,
    inpaint: image_cli.Mask = None,
    resamples: image_cli.Resamples = None,
    jump_length: image_cli.JumpLength = None,
    paste: image_cli.Paste = True,
    mean: Annotated[Path | None, typer.Option(help="NIfTI file: the mean of the -n volumes.")] = None,
    variance: Annotated[Path | None, typer.Option(help="NIfTI file: their variance (by n - 1).")] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    batch: Annotated[int, typer.Option(help="Samples a network call.")] = 1,
    engine: Annotated[EngineName, typer.Option(help="What runs the networks.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="As 4GiB: of the process, with cuda, tensorrt, tensorrt-rtx of the GPU; decodes in slabs where it must."
        ),
    ] = None,
    compat: Annotated[Literal["monai-1.6"] | None, typer.Option(help="MONAI 1.6.1's own numbers.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write a picture of the three middle planes.")] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Sample volumes and write them as NIfTI."""
    from .chain import Chain, stage_folder
    from .condition_text import files_of, parse_weights
    from .default_artifact import default_artifact
    from .engine_auto import resolve_engine
    from .pipeline import load
    from .sample_output import make_places, write_volumes
    from .sample_volumes import Asked, sample_volumes
    from .sizes import parse_sizes
    from .volume import read_nifti

    weights = parse_weights(guidance)
    places = make_places(
        output, count, png, mean, variance, weights if isinstance(weights, list) else (),
        [
            *(path for path in (image, inpaint) if path is not None),
            *files_of((*(condition or ()), *(negative or ())), mask or (), then or ()),
        ],
    )  # fmt: skip
    asked = Asked(
        settings={
            "steps": steps, "scheduler": scheduler, "spacing": spacing, "eta": eta, "guidance": weights,
            "strength": strength, "compat": compat, "reuse": reuse, "label": label, "scale": scale,
        },
        choice={"temperature": temperature, "top_k": top_k, "top_p": top_p},
        condition=condition or (), negative=negative or (), mask=mask or (), size=parse_sizes("sample", size),
        image=None if image is None else read_nifti(image),
        inpaint=image_cli.read_inpaint(image, inpaint, resamples, jump_length, paste),
        then=then or (),
    )  # fmt: skip
    later = list(map(stage_folder, asked.then))
    folder = artifact or default_artifact(controlled=bool(mask))
    model: Any
    if later:  # whose stages are opened in turn
        model = Chain([folder, *later], engine, threads, memory_limit)
        names = [spec.name for spec in model.specs]
        runs: str = resolve_engine(engine, threads)[0]
    else:
        model = load(folder, engine, threads, memory_limit)
        names, runs = [model.spec.name], f"{model.engine.name}, {model.engine.threads} threads"
    if not quiet:
        typer.echo(f"volcast: {', then '.join(names)} on {runs}", err=True)
    with progress(shown=not quiet and (sys.stderr.isatty() or not as_json)) as on_step:
        volumes = sample_volumes(model, asked, count, seed, batch=batch, on_step=on_step)
        lines = write_volumes(places, volumes, names[0], seed)
    if as_json:
        typer.echo(json.dumps([line.fields for line in lines]))
    elif not quiet:
        typer.echo("\n".join(line.text for line in lines))


def info(
    context: typer.Context,
    artifact: Artifact = None,
    memory: Annotated[bool, typer.Option("--memory", help="The memory of each program, foretold.")] = False,
    size: Annotated[str | None, typer.Option(help="With --memory: latent sizes, as 8,12,8.")] = None,
    batch: Annotated[int, typer.Option(help="With --memory: samples a network call.")] = 1,
    engine: Annotated[
        str,
        typer.Option(
            help="With --memory: openvino or onnxruntime, auto: both; tensorrt, tensorrt-rtx: built plans."
        ),
    ] = "auto",
    memory_limit: Annotated[
        str | None, typer.Option(help="With --memory: as 2GiB; how a decode fits in.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show an artifact (or check a pack): programs, nodes and FLOPs before and after, axes, conditions, provenance."""
    from . import describe
    from .artifact import read_artifact, read_manifest
    from .default_artifact import default_artifact
    from .options import leave_out
    from .pack import PACK, read_pack

    of_memory = ("size", "batch", "engine", "memory_limit")
    if not memory:
        leave_out(context, "for --memory alone", of_memory)
    folder = artifact or default_artifact()
    if (folder / PACK).is_file():
        leave_out(
            context,
            f"{folder} is a pack, whose artifact lies in {folder / 'artifact'}",
            ("memory", *of_memory),
        )
        manifest = read_pack(folder)
        typer.echo(manifest.model_dump_json() if as_json else manifest.as_text())
        return
    if memory:
        from .describe_memory import memory_rows, memory_text
        from .sizes import parse_bytes, parse_sizes

        limit = None if memory_limit is None else parse_bytes("info", memory_limit)
        rows = memory_rows(read_artifact(folder), folder, engine, parse_sizes("info", size), batch, limit)
        typer.echo(json.dumps(rows) if as_json else memory_text(rows))
        return
    spec = read_manifest(folder)
    typer.echo(json.dumps(describe.as_dict(spec, folder)) if as_json else describe.as_text(spec, folder))


@contextmanager
def progress(shown: bool) -> Iterator[Callable[[int, int], None]]:
    from tqdm import tqdm

    with tqdm(
        desc="steps", unit="step", disable=None if shown else True, file=sys.stderr, leave=False
    ) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_step
