"""What does the loop itself cost a step, around a network that costs nothing?

volcast's whole path (row, inputs, call into Python, update in C++) beside the DDIM update in numpy and MONAI's
`DDIMScheduler.step` in torch. Run it as `python -m volcast.benchmarks.loop`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from volcast.runtime.pipeline import Model
from volcast.runtime.spec import ArtifactSpec

from .bench import environment, measure, summarize
from .free_engine import FreeEngine

LATENTS = ((4, 8, 12, 8), (3, 20, 28, 20), (8, 36, 44, 28), (4, 64, 64, 64))
"""`(C, D, H, W)`: the bundled hippocampus, UK Biobank's brain LDM, BraTS, MAISI at 256^3."""
TRAIN, ROW = 1000, 960
Loop = Callable[[int], object]


def free_model(latent: tuple[int, ...]) -> Model:
    """A model of that latent shape whose networks cost nothing and return zeros."""

    def program(file: str, inputs: dict[str, list[int | str]], name: str, shape: list[int | str]) -> object:
        tensors = [{"name": key, "dtype": "float32", "shape": value} for key, value in inputs.items()]
        out = [{"name": name, "dtype": "float32", "shape": shape}]
        counts = {"nodes": 0, "nodes_before": 0, "flops": 0, "flops_before": 0}
        return {"file": file, "inputs": tensors, "outputs": out, **counts}

    x: list[int | str] = ["batch", *latent]
    row: list[int | str] = ["batch", ROW]
    spec = ArtifactSpec.model_validate(
        {
            "format": 1,
            "name": "free",
            "precision": "fp32",
            "axes": [
                {"name": "batch", "minimum": 1, "maximum": 1},
                {"name": "steps", "minimum": 1, "maximum": TRAIN},
            ],
            "programs": {
                "schedule": program("schedule.onnx", {"timesteps": ["steps"]}, "rows", ["steps", ROW]),
                "step": program("step.onnx", {"x": x, "row": row}, "out", x),
            },
            "scheduler": {},
            "scale_factor": 1.0,
            "latent_shape": latent,
            "spacing_mm": [1.0] * (len(latent) - 1),
            "files": {"schedule.onnx": "0" * 64, "step.onnx": "0" * 64},
        }
    )
    return Model(Path(), spec, FreeEngine())


def volcast_loop(latent: tuple[int, ...]) -> Loop:
    """`steps -> volume` through `Model.sample`."""
    model = free_model(latent)
    return lambda steps: model.sample(steps=steps, scheduler="ddim", compat="monai-1.6")


def numpy_loop(latent: tuple[int, ...]) -> Loop:
    """DDIM (arXiv:2010.02502 Eq. 12, eta 0) in float32 numpy, its scalars computed ahead."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, TRAIN))
    eps = np.zeros((1, *latent), np.float32)
    start = np.random.default_rng(0).standard_normal(eps.shape, np.float32)

    def run(steps: int) -> object:
        times = np.linspace(0, TRAIN - 1, steps).round().astype(int)[::-1]
        now, after = alpha_bar[times], np.append(alpha_bar[times[1:]], 1.0)
        signal, sigma = np.sqrt(after / now), np.sqrt(1 - after) - np.sqrt(after / now * (1 - now))
        x = start
        for a, b in zip(signal.astype(np.float32), sigma.astype(np.float32), strict=True):
            x = a * x + b * eps
        return x

    return run


def monai_loop(latent: tuple[int, ...], threads: int) -> Loop:
    """MONAI's scheduler, stepped as its inferer does."""
    import torch
    from monai.networks.schedulers.ddim import DDIMScheduler

    torch.set_num_threads(threads)
    scheduler = DDIMScheduler(num_train_timesteps=TRAIN, clip_sample=False)
    eps = torch.zeros(1, *latent)
    start = torch.randn(1, *latent, generator=torch.Generator().manual_seed(0))

    def run(steps: int) -> object:
        scheduler.set_timesteps(steps)
        x = start
        for t in scheduler.timesteps:
            x, _ = scheduler.step(eps, t, x)
        return x

    return run


def step_cost(loops: list[Loop], steps: int, repeats: int) -> list[tuple[float, ...]]:
    """Microseconds a step of every loop, a number a round: runs of 2 * steps less runs of steps, in turns.

    The difference leaves out what a run costs once (noise, tables, checks).
    """
    calls = [lambda loop=loop, n=n: loop(n) for loop in loops for n in (steps, 2 * steps)]
    seconds = measure(calls, warmup=1, repeats=repeats)
    return [
        tuple(1e6 * (long - short) / steps for short, long in zip(*pair, strict=True))
        for pair in zip(seconds[::2], seconds[1::2], strict=True)
    ]


def main(
    steps: Annotated[int, typer.Option(min=1, max=TRAIN // 2)] = 100,
    repeats: Annotated[int, typer.Option(min=1, max=1000)] = 9,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Of torch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line instead of a table.")] = False,
) -> None:
    """Microseconds a step outside the network, by latent size: median (min..max)."""
    names = ("volcast", "numpy", "MONAI")
    found = {}
    for latent in LATENTS:
        costs = step_cost(
            [volcast_loop(latent), numpy_loop(latent), monai_loop(latent, threads)], steps, repeats
        )
        found["x".join(map(str, latent))] = {
            name: summarize(cost) for name, cost in zip(names, costs, strict=True)
        }
    if as_json:
        rows = {key: {name: s.as_dict() for name, s in row.items()} for key, row in found.items()}
        typer.echo(json.dumps({"benchmark": "loop", "environment": environment(threads), "us_a_step": rows}))
        return
    typer.echo(f"{'us a step':>14}" + "".join(f"{name:>24}" for name in names))
    for key, row in found.items():
        cells = [f"{s.median:.0f} ({s.minimum:.0f}..{s.maximum:.0f})" for s in row.values()]
        typer.echo(f"{key:>14}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    typer.run(main)
