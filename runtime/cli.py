"""`volcast sample` and `volcast info`. Heavy imports stand inside the functions: `--help` must be quick."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .engine_name import EngineName

if TYPE_CHECKING:
    from .request import Settings
    from .volume import Volume

Artifact = Annotated[
    Path | None,
    typer.Argument(help="Folder written by `volcast export`; left out: the bundled hippocampus model."),
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; left out: the model's own.")]
Scheduler = Annotated[
    Literal["ddim", "ddpm", "pndm", "dpm-solver++", "rflow"] | None,
    typer.Option(help="Left out: the model's own."),
]
Guidance = Annotated[float | None, typer.Option(help="Weight of classifier-free guidance.")]
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
    guidance: Annotated[
        str | None,
        typer.Option(
            help="Weight of classifier-free guidance; 1..10 or 1,2.5,7: a volume for each, OUTPUT_guidance1, .."
        ),
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option("--condition", "-c", help="name=0.5, name=0.5,0.2 or name=@file.npy; repeatable."),
    ] = None,
    negative: Annotated[
        list[str] | None,
        typer.Option(help="As --condition, for guidance's other branch (a negative prompt); repeatable."),
    ] = None,
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
    inpaint: Annotated[
        Path | None,
        typer.Option(help="With --image: NIfTI mask, not 0 where to paint anew (RePaint); the rest stays."),
    ] = None,
    resamples: Annotated[
        int | None, typer.Option(help="With --inpaint: runs of each stretch of steps; left out: 4.")
    ] = None,
    jump_length: Annotated[
        int | None, typer.Option(help="With --inpaint: steps of such a stretch; left out: 1.")
    ] = None,
    paste: Annotated[bool, typer.Option(help="With --inpaint: put the image's own voxels back.")] = True,
    mean: Annotated[Path | None, typer.Option(help="NIfTI file: the mean of the -n volumes.")] = None,
    variance: Annotated[Path | None, typer.Option(help="NIfTI file: their variance (by n - 1).")] = None,
    temperature: Annotated[float | None, typer.Option(help="Token models: above 0; left out: 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Token models: of the k most probable codes.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Token models: of the fewest codes of this sum.")
    ] = None,
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
    from .chain import Chain, parse_stage
    from .condition_text import mask_texts, parse_conditions, parse_weights
    from .default_artifact import default_artifact
    from .ensemble import Ensemble
    from .generator_model import GeneratorModel, refuse_settings
    from .image_cli import check_maps, edited, read_inpaint, save_maps
    from .picture import mosaic, save_picture
    from .pipeline import load
    from .sizes import parse_sizes
    from .token_cli import choice_settings
    from .token_model import TokenModel
    from .volume import read_nifti

    weights = parse_weights(guidance)
    maps = [path for path in (mean, variance) if path is not None]
    check_maps(maps, variance is not None, count, weights)
    outputs = output_files(
        output or Path("sample.nii.gz"), count, png, weights if isinstance(weights, list) else ()
    )
    for path in maps:
        output_files(path, 1, None)
    latent = parse_sizes("sample", size)
    start = None if image is None else read_nifti(image)
    painted = read_inpaint(image, inpaint, resamples, jump_length, paste)
    folder = artifact or default_artifact(controlled=bool(mask))
    stages = [parse_stage(text) for text in then or ()]
    model = load(folder, engine, threads, memory_limit)
    if not quiet:
        typer.echo(
            f"volcast: {model.spec.name} on {model.engine.name}, {model.engine.threads} threads", err=True
        )
    settings: Settings = {
        "steps": steps,
        "scheduler": scheduler,
        "spacing": spacing,
        "eta": eta,
        "guidance": weights,
    }
    settings |= {"strength": strength, "compat": compat, "reuse": reuse}
    given = settings | {
        "strength": strength != 1,
        "mask": mask,
        "size": size,
        "image": image,
        "inpaint": inpaint,
        "negative": negative,
        "reuse": reuse != 1,
        "then": then,
    }
    choice = choice_settings(model, temperature, top_k, top_p, given)
    if isinstance(model, GeneratorModel):
        refuse_settings(
            model.spec, {key: value for key, value in given.items() if key not in ("mask", "image")}
        )
    conditions = parse_conditions(model.spec, [*(condition or ()), *mask_texts(model.spec, mask or ())])
    lines: list[dict[str, Any] | str] = []
    shown: list[Volume] = []
    with progress(shown=not quiet and (sys.stderr.isatty() or not as_json)) as on_step:
        common: dict[str, Any] = {"batch": batch, "condition": conditions, "on_step": on_step}
        if isinstance(model, TokenModel):
            volumes = model.sample_many(count, seed, **common, **choice)
        elif isinstance(model, GeneratorModel):
            volumes = model.sample_many(count, seed, **common, image=start)
        else:
            common["negative"] = parse_conditions(model.spec, negative) if negative else None
            common |= edited(model.spec, start, painted)
            common |= {"size": latent, **settings}
            if stages:
                chain = Chain([folder, *(path for path, _ in stages)], engine, threads, memory_limit)
                volumes = chain.sample_many(count, seed, then=[stage for _, stage in stages], **common)
            else:
                volumes = model.sample_many(count, seed, **common)
        ensemble = Ensemble()
        for number, (path, volume) in enumerate(zip(outputs, volumes, strict=True)):
            shown += [volume] if png else []
            if maps:
                ensemble.add(volume)
            if maps and output is None:
                continue
            volume.save(path, f"volcast {model.spec.name} seed {seed}")
            sample = number * count // len(outputs)
            lines.append(_described(path, volume, seed, sample) if as_json else _summary(path, volume))
    for what, path in save_maps(ensemble, mean, variance, f"volcast {model.spec.name} seed {seed}").items():
        lines.append(
            {"path": str(path), "seed": seed, what: ensemble.count}
            if as_json
            else f"{path}: {what} of {ensemble.count}"
        )
    if png is not None:
        each = [f" guidance {w:g}" for w in weights] if isinstance(weights, list) else [""]
        captions = [f"{model.spec.name} seed {seed} sample {i}{w}" for i in range(count) for w in each]
        save_picture(mosaic(shown, captions if len(captions) > 1 else ()), png)
    if as_json:
        typer.echo(json.dumps(lines))
    elif not quiet:
        typer.echo("\n".join(str(line) for line in lines))


def info(
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
    from .pack import PACK, read_pack

    folder = artifact or default_artifact()
    if (folder / PACK).is_file():
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


def output_files(output: Path, count: int, png: Path | None, weights: Sequence[float] = ()) -> list[Path]:
    from .picture import check_png_path
    from .volume import check_nifti_path

    check_nifti_path(output)
    for path in (output, *([] if png is None else [check_png_path(png)])):
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(
                f"[sample] {path.parent} is not a folder that can be written to; choose another output"
            )
    suffix = ".nii.gz" if output.name.endswith(".nii.gz") else ".nii"
    numbers = [f"_{i}" for i in range(count)] if count != 1 else [""]
    each = [f"_guidance{weight:g}" for weight in weights] or [""]
    stem = output.name.removesuffix(suffix)
    outputs = [output.with_name(f"{stem}{number}{weight}{suffix}") for number in numbers for weight in each]
    for path in (*outputs, *([] if png is None else [png])):
        if path.is_dir():
            raise ValueError(f"[sample] {path} is a folder; choose another output")
    return outputs


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


def _described(path: Path, volume: Volume, seed: int, sample: int) -> dict[str, Any]:
    assert volume.report is not None
    shape, report = list(volume.array.shape), volume.report.as_dict()
    return {"path": str(path), "seed": seed, "sample": sample, "shape": shape, "report": report}


def _summary(path: Path, volume: Volume) -> str:
    report = volume.report
    assert report is not None
    shape = " x ".join(str(size) for size in volume.array.shape)
    peak = "process peak" if report.peak_of_process else "peak"
    return (
        f"{path}: {shape}, {report.total_seconds:.2f} s for {report.batch} ({report.steps} {report.scheduler} steps "
        f"{report.loop_seconds:.2f} s, decode {report.decode_seconds:.2f} s, loop overhead {report.overhead:.2%}), "
        f"{peak} {report.peak_bytes / 2**20:.0f} MiB"
    )
