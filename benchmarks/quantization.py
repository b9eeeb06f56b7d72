"""How much faster is an int8 artifact than the float32 one that it came from?

`python -m volcast.benchmarks.quantization FP32 INT8`: steps and decodes of both in turns, on one engine, at several
numbers of threads and sizes; ratios of neighbours, so that a slow moment of the machine cancels. With OpenVINO also
which kernels ran. What int8 loses is `volcast verify INT8 --against FP32`'s to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from volcast.runtime.artifact import read_artifact
from volcast.runtime.engine import shapes
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.programs import ProgramName, Programs
from volcast.runtime.sizes import latent_sizes, parse_sizes

from .bench import environment, measure, paired_ratios, summarize
from .layer_profile import capabilities, layer_profile
from .report import append

KERNELS = 12
"""Kinds of layers that a result lists, the slowest first."""


def program_call(
    folder: Path, name: ProgramName, engine: str, threads: int, size: Sequence[int] | None, batch: int
) -> tuple[Callable[[], object], dict[str, int]]:
    """A call of a program of the artifact in `folder` on random inputs, and its sizes by axis.

    Raises ValueError for a bad artifact, engine or size, or a program that the artifact lacks.
    """
    spec = read_artifact(folder)
    programs = Programs(folder, spec, open_engine(engine, threads))
    described = programs.describe(name)
    known = {**latent_sizes(spec, size, "bench")[1], "batch": batch}
    taken = dict.fromkeys(
        axis for tensor in described.inputs for axis in tensor.shape if isinstance(axis, str)
    )
    sizes = {axis: value for axis, value in known.items() if axis in taken}
    fixed = shapes(described, sizes)
    program = programs.open(name, fixed)
    generator = np.random.default_rng(0)
    inputs = {key: generator.standard_normal(shape, np.float32) for key, shape in fixed.items()}
    return lambda: program(inputs), sizes


def race(
    folders: tuple[Path, Path], name: ProgramName, engine: str, threads: int, size: Sequence[int] | None, batch: int,
    repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """One line of a result: milliseconds of both artifacts and the float32 one's time over the other's."""
    calls = [program_call(folder, name, engine, threads, size, batch) for folder in folders]
    before, after = measure([call for call, _ in calls], warmup=3, repeats=repeats)
    line: dict[str, Any] = {
        "program": name,
        "engine": engine,
        "threads": threads,
        "sizes": calls[0][1],
        "fp32_ms": summarize([1e3 * each for each in before]).as_dict(),
        "int8_ms": summarize([1e3 * each for each in after]).as_dict(),
        "speedup": paired_ratios(before, after).as_dict(),
        "speedup_of_minima": min(before) / min(after),
    }
    if engine == "openvino":
        line["capabilities"] = capabilities()
        for key, folder in zip(("fp32_kernels", "int8_kernels"), folders, strict=True):
            described = read_artifact(folder).programs[name]
            found = layer_profile(folder / described.file, described, calls[0][1], threads, min(repeats, 30))
            line[key] = [kernel.as_dict() for kernel in found[:KERNELS]]
    return line


def as_text(line: dict[str, Any]) -> str:
    """The line for a reader."""
    before, after, speedup = line["fp32_ms"], line["int8_ms"], line["speedup"]
    size = "x".join(str(value) for axis, value in line["sizes"].items() if axis != "batch")
    return (
        f"{line['program']:<7} {line['engine']:<11} {line['threads']} threads, batch {line['sizes']['batch']}, latent {size}: "
        f"{before['median']:.1f} -> {after['median']:.1f} ms, {speedup['median']:.2f}x "
        f"({speedup['minimum']:.2f}..{speedup['maximum']:.2f}), of the fastest calls {line['speedup_of_minima']:.2f}x"
    )


def main(
    fp32: Annotated[Path, typer.Argument(help="Folder of the float32 artifact.")],
    int8: Annotated[Path, typer.Argument(help="Folder that `volcast quantize` wrote.")],
    program: Annotated[list[str], typer.Option(help="step, decode; repeatable.")] = ["step", "decode"],  # noqa: B006
    engine: Annotated[str, typer.Option(help="openvino or onnxruntime.")] = "openvino",
    threads: Annotated[list[int], typer.Option(help="Repeatable.")] = [1, 2],  # noqa: B006
    size: Annotated[
        str | None, typer.Option(help="Latent sizes, as 8,12,8; left out: the artifact's.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples a call.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, max=10_000)] = 100,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append a JSON line a result.")
    ] = None,
) -> None:
    """Steps and decodes of a float32 and an int8 artifact, in turns."""
    latent = parse_sizes("bench", size)
    for name in program:
        for count in threads:
            where = environment(count)
            line = race((fp32, int8), name, engine, count, latent, batch, repeats)  # type: ignore[arg-type]
            typer.echo(f"{as_text(line)}; load {where['load']}")
            if output is not None:
                facts = read_artifact(int8).provenance["quantization_data"]
                append(output, {"benchmark": "quantization", "data": facts, "environment": where, **line})
            else:
                typer.echo(json.dumps({key: line[key] for key in line if key.endswith("_kernels")}))


if __name__ == "__main__":
    typer.run(main)
