"""How much does a network step with a label map cost, hoisted and as MONAI runs it?

    python -m volcast.benchmarks.masks [--repeats 20] [--threads 2] [-o results/masks.jsonl]

The bundled model's ControlNet and its SPADE network, float32, batch 1: one call of MONAI's networks in PyTorch beside one
of `step` on each engine, in turns in one process. What `prepare` and `schedule` compute is not in a step; `prepare_ms` is
what a request pays once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle, read_bundle
from volcast.export.monai_masks import Controls, Shown
from volcast.export.similarity import relative_l2
from volcast.runtime.artifact import read_artifact
from volcast.runtime.conditions import resolve
from volcast.runtime.default_artifact import BUNDLE
from volcast.runtime.engine_auto import open_engine, physical_cores
from volcast.runtime.programs import Programs
from volcast.runtime.sampling import prepared
from volcast.runtime.sizes import latent_sizes

from .bench import environment, measure
from .beside_monai import MONAI, in_turns, run_cases

Array = NDArray[np.generic]
CASES: dict[str, dict[str, Any]] = {
    "ControlNet": {"controlnets": ["controlnet_def"]},
    "SPADE": {"settings": {"unet": "spade_network_def"}},
}
ENGINES = ("openvino", "onnxruntime")
TIMESTEP = 500.0


def label_map(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Two nested ellipsoids, labels 1 and 2."""
    middle = [(size - 1) / 2 for size in shape]
    radii = sum(
        ((grid - at) / size) ** 2 for grid, at, size in zip(np.indices(shape), middle, shape, strict=True)
    )
    return np.where(radii < 0.02, 2, np.where(radii < 0.08, 1, 0)).astype(np.int64)


def monai_step(bundle: Bundle, x: Array, values: Mapping[str, Array]) -> Callable[[], Array]:
    """One call of MONAI's networks, as its inferer makes it."""
    shown = Shown(bundle, values)
    tensor, timesteps = torch.from_numpy(x), torch.tensor([TIMESTEP])
    given: dict[str, torch.Tensor] = {}
    if "context" in values:
        given["context"] = torch.from_numpy(values["context"])
    if shown.segmentation is not None:
        given["seg"] = shown.segmentation
    controls = Controls(bundle, shown, {})

    @torch.no_grad()
    def run() -> Array:
        residuals: dict[str, Any] = {}
        if bundle.controls:
            down, middle = controls(tensor, timesteps, shown.hints[0], given.get("context"))
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        out: Array = bundle.unet(tensor, timesteps=timesteps, **given, **residuals).numpy()
        return out

    return run


def case(name: str, artifact: Path, threads: int, repeats: int) -> dict[str, Any]:
    """One line of the result."""
    bundle = read_bundle(BUNDLE, **CASES[name])
    spec = export_bundle(bundle, artifact)
    _, sizes = latent_sizes(spec)
    mask = label_map(tuple(sizes[f"o{axis}"] for axis in range(3)))
    values = {key: value[None] for key, value in resolve(spec, {"mask": mask}, sizes).values.items()}
    x = np.random.default_rng(0).standard_normal((1, *bundle.latent_shape)).astype(np.float32)
    steps: dict[str, Callable[[], Any]] = {MONAI: monai_step(bundle, x, values)}
    prepares: dict[str, Callable[[], Any]] = {}
    wanted = steps[MONAI]()
    errors = {}
    for engine in ENGINES:
        programs = Programs(artifact, read_artifact(artifact), open_engine(engine, threads))
        prepares[engine] = partial(prepared, spec, programs, values)
        inputs = {
            "x": x,
            "row": programs.call("schedule", {"timesteps": np.array([TIMESTEP], np.float32)})["rows"],
        }
        inputs |= prepares[engine]()
        step = programs.open("step", {key: value.shape for key, value in inputs.items()})
        steps[f"volcast, {engine}"] = partial(step, inputs)
        errors[engine] = relative_l2(step(inputs)["out"], wanted)
    figures = in_turns(steps, repeats, key="step_ms")
    once = measure(list(prepares.values()), warmup=1, repeats=5)
    ours = spec.programs["step"]
    return {
        "benchmark": "masks", "case": name, "environment": environment(threads), "latent": list(spec.latent_shape),
        "gflop": {"MONAI": round(ours.flops_before / 1e9, 3), "step": round(ours.flops / 1e9, 3)},
        **figures,
        "prepare_ms": {key: round(1e3 * min(taken), 2) for key, taken in zip(prepares, once, strict=True)},
        "relative_l2": errors,
    }  # fmt: skip


def main(
    repeats: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    threads: Annotated[int, typer.Option(min=1, max=1024)] = physical_cores(),
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines to add to.")] = None,
) -> None:
    """Milliseconds a step with a label map: median (min..max), and the ratio round by round."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        run_cases(
            CASES, lambda name: case(name, Path(folder) / name, threads, repeats), output, key="step_ms"
        )


if __name__ == "__main__":
    typer.run(main)
