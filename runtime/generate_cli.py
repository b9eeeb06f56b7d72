"""`volcast generate`. Heavy imports stand inside the functions: `--help` must be quick."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli import Artifact, AsJson, Guidance, Scheduler, Steps, Temperature, TopK, TopP
from .engine_name import EngineName

if TYPE_CHECKING:
    from .generate import Generation
    from .generate_worker import Crew, Recipe


def generate(
    context: typer.Context,
    artifact: Artifact = None,
    num: Annotated[
        int | None, typer.Option("--num", "-n", help="Volumes that the dataset is to hold.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The dataset's folder.")] = None,
    seed: Annotated[int, typer.Option(help="Volume i takes its noise from (seed, i).")] = 0,
    steps: Steps = None,
    scheduler: Scheduler = None,
    guidance: Guidance = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            "--condition",
            "-c",
            help="name=0.5, name=@FILE (.npy, .nii.gz), name=uniform:0,1 (drawn for each volume), "
            "or a .csv or .jsonl file with a row a volume; repeatable.",
        ),
    ] = None,
    negative: Annotated[
        list[str] | None,
        typer.Option(help="name=0.5 or name=@FILE, for guidance's other branch of each; repeatable."),
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Processes, with --ray actors, with --server requests at a time; left out: as many as there are cores "
            "for (one with a GPU's engine), 8 a server.",
        ),
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="What runs the networks.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Of each worker; left out: 1, or the servers'.")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, or auto.")] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(
            help="Host and port of a server's gRPC (volcast serve), which then samples; repeatable."
        ),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Do nothing but verify the sha256 of this dataset.")
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Write a dataset of volumes. Stopped or killed at any moment, the same command goes on where it was."""
    from .options import leave_out

    if check is not None:
        leave_out(context, "--check makes no volumes", context.params.keys() - {"check", "as_json", "quiet"})
        _check(check, as_json, quiet)
        return
    if num is None or out is None:
        raise ValueError("[generate] --num and --out are needed: how many volumes, and into which folder")
    from .default_artifact import default_artifact
    from .generate import prepare

    if ray is not None and server:
        raise ValueError("[generate] --ray and --server: give one of them")
    made_with: tuple[str, int] = engine, threads or 1
    if server and (engine == "auto" or threads is None):
        from .generate_servers import served_with

        found = served_with(server)
        made_with = found[0] if engine == "auto" else engine, threads or found[1]
    generation = prepare(
        artifact or default_artifact(), num, seed=seed, engine=made_with[0], threads=made_with[1], here=not server,
        condition=condition or (), negative=negative or (),
        settings={
            "steps": steps, "scheduler": scheduler, "guidance": guidance, "temperature": temperature, "top_k": top_k,
            "top_p": top_p,
        },
    )  # fmt: skip
    try:
        _generate(generation, out, workers, ray, server or (), as_json, quiet)
    except KeyboardInterrupt:
        if not quiet:
            typer.echo(f"volcast: stopped; the same command goes on with {out}", err=True)
        raise


def _generate(
    generation: Generation, out: Path, workers: int | None, ray: str | None, servers: Sequence[str], as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    from .dataset import open_dataset
    from .generate import run

    began = time.perf_counter()
    with open_dataset(out, generation.described()) as dataset:
        there = sum(index < generation.count for index in dataset.done)
        if dataset.dropped and not quiet:
            typer.echo(
                f"volcast: {dataset.dropped} files are gone or cut short; they are made again", err=True
            )
        lost = 0
        if there < generation.count:
            with (
                _crew(generation, dataset.parts, workers, ray, servers) as (crew, count),
                _progress("volumes", generation.count, there, quiet) as on_volume,
            ):
                if not quiet:
                    where = "processes" if ray is None else "Ray actors"
                    where = f"requests at a time to {', '.join(servers)}" if servers else where
                    typer.echo(
                        f"volcast: {generation.name} on {generation.engine}, {count} {where}", err=True
                    )
                lost = run(generation, dataset, crew, count, on_volume)
    seconds = time.perf_counter() - began
    made = generation.count - there
    if as_json:
        summary = {"out": str(out), "volumes": generation.count, "made": made, "already_there": there}
        typer.echo(json.dumps({**summary, "workers_lost": lost, "seconds": seconds}))
    elif not quiet:
        died = f", {lost} workers died" if lost else ""
        rate = f" ({made / seconds:.2f} volumes/s)" if made else ""
        typer.echo(f"{out}: {generation.count} volumes, {made} made in {seconds:.1f} s{rate}{died}")


@contextmanager
def _crew(
    generation: Generation, parts: Path, workers: int | None, ray: str | None, servers: Sequence[str]
) -> Iterator[tuple[Crew, int]]:
    """The workers and how many of them are wanted."""
    from .engine_auto import INSTALL, physical_cores

    recipe: Recipe = generation.recipe(parts.resolve())
    on_cpu = generation.engine in INSTALL
    with ExitStack() as stack:
        crew: Crew
        if servers:
            from .generate_servers import AT_ONCE, Servers

            crew = Servers(recipe, servers)
            stack.callback(crew.close)
            yield crew, workers or AT_ONCE * len(servers)
            return
        if ray is None:
            from .generate_processes import Processes

            crew, cores = Processes(recipe), physical_cores()
        else:
            from .generate_ray import RayActors

            # Ray tells of dead actors on stdout, which may carry --json.
            stack.enter_context(redirect_stdout(sys.stderr))
            crew = RayActors(recipe, ray, gpus=0 if on_cpu else 1)
            cores = crew.cpus()
        stack.callback(crew.close)
        yield crew, workers or (max(1, cores // generation.threads) if on_cpu else 1)


def _check(folder: Path, as_json: bool, quiet: bool) -> None:
    """Exit code 1 if a file is missing or altered."""
    from .dataset_manifest import check_dataset

    with _progress("files", None, 0, quiet) as on_file:
        found = check_dataset(folder, on_file)
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        for word, files in (
            ("missing", found.missing),
            ("altered", found.altered),
            ("not in the manifest", found.unlisted),
        ):
            for file in files:
                typer.echo(f"{word}: {file}")
        typer.echo(
            f"{folder}: {found.intact} intact, {len(found.missing)} missing, {len(found.altered)} altered"
        )
    if found.missing or found.altered:
        if not quiet:
            typer.echo(
                "volcast: delete the altered files, and the same `volcast generate` makes all of them again",
                err=True,
            )
        raise typer.Exit(1)


@contextmanager
def _progress(unit: str, total: int | None, done: int, quiet: bool) -> Iterator[Callable[[], object]]:
    """A bar with rate and time left, on a terminal alone."""
    from tqdm import tqdm

    with tqdm(
        total=total, initial=done, unit=f" {unit}", disable=True if quiet else None, file=sys.stderr, leave=False,
        smoothing=0.05,
    ) as bar:  # fmt: skip
        yield bar.update
