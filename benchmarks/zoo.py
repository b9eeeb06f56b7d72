"""How long do the zoo's small models take in one call, and in MONAI?

    python -m volcast.benchmarks.zoo [--repeats 20] [--threads 2] [-o results/zoo.jsonl]

The GAN of mednist_gan, the VAE-GAN of the SPADE tutorial and a step of mednist_ddpm, at full size with random weights,
float32, batch 1: MONAI's network in PyTorch beside each engine, in turns in one process. A SPADE image is timed twice:
with a label map that is new (`prepare` too), and with one that stays.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from monai.networks.nets.generator import Generator
from monai.networks.nets.spade_network import SPADENet
from numpy.typing import NDArray
from torch.nn import functional

from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle
from volcast.export.generator_artifact import export_generator
from volcast.export.generator_bundle import GeneratorBundle
from volcast.export.similarity import relative_l2
from volcast.runtime.artifact import read_manifest
from volcast.runtime.engine_auto import open_engine, physical_cores
from volcast.runtime.programs import Programs
from volcast.runtime.spec import ConditionSpec, SchedulerSpec

from .bench import environment
from .beside_monai import MONAI, in_turns, randomised, run_cases

Array = NDArray[np.generic]
Calls = dict[str, Callable[[], Array]]
ENGINES = ("openvino", "onnxruntime")
CASES = ("mednist_gan", "spade_gan", "mednist_ddpm")


def gan(folder: Path, threads: int) -> Calls:
    """The image of one noise vector."""
    network = randomised(Generator((64,), (64, 8, 8), (32, 16, 8, 1), (2, 2, 2, 1)))
    z = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    _export(folder, network, (64,), (1, 64, 64), 0, True)
    calls: Calls = {MONAI: lambda: _numpy(torch.sigmoid(network(torch.from_numpy(z))))}
    for engine in ENGINES:
        decode = partial(_programs(folder, engine, threads).call, "decode", {"z": z})
        calls[f"volcast, {engine}"] = lambda decode=decode: decode()["image"]  # type: ignore[misc]
    return calls


def spade_gan(folder: Path, threads: int) -> Calls:
    """The image of a label map, new or not, and one noise vector."""
    network = randomised(
        SPADENet(
            spatial_dims=2, in_channels=1, out_channels=1, label_nc=6, input_shape=[128, 128],
            channels=[16, 32, 64, 128], z_dim=16, is_vae=True,
        )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    z, mask = rng.standard_normal((1, 16)).astype(np.float32), rng.integers(0, 6, (1, 128, 128))
    _export(folder, network, (16,), (1, 128, 128), 6, False)

    def eager() -> Array:
        channels = functional.one_hot(torch.from_numpy(mask), 6).movedim(-1, 1).float()
        return _numpy(network.decode(channels, torch.from_numpy(z)))

    calls: Calls = {MONAI: eager}
    for engine in ENGINES:
        programs = _programs(folder, engine, threads)
        kept = programs.call("prepare", {"mask": mask})

        def image(programs: Programs = programs, kept: Any = kept) -> Array:
            return programs.call("decode", {"z": z, **kept})["image"]

        def whole(programs: Programs = programs) -> Array:
            return programs.call("decode", {"z": z, **programs.call("prepare", {"mask": mask})})["image"]

        calls |= {f"volcast, {engine}": whole, f"volcast, {engine}, same label map": image}
    return calls


def ddpm(folder: Path, threads: int) -> Calls:
    """One denoising step."""
    network = randomised(
        DiffusionModelUNet(
            spatial_dims=2, in_channels=1, out_channels=1, channels=(64, 128, 128), num_res_blocks=1,
            attention_levels=(False, True, True), num_head_channels=128,
        )
    )  # fmt: skip
    bundle = Bundle(
        name="mednist_ddpm", unet=network, autoencoder=None, scheduler=SchedulerSpec(scheduler="ddpm", clip_sample=True),
        scale_factor=1.0, latent_shape=(1, 64, 64), spacing_mm=(1.0, 1.0), conditions=(), provenance={},
    )  # fmt: skip
    export_bundle(bundle, folder, batch=(1, 4))
    x, timesteps = (
        np.random.default_rng(0).standard_normal((1, 1, 64, 64)).astype(np.float32),
        np.array([500.0], np.float32),
    )
    calls: Calls = {MONAI: lambda: _numpy(network(torch.from_numpy(x), torch.from_numpy(timesteps)))}
    for engine in ENGINES:
        programs = _programs(folder, engine, threads)
        given = {"x": x, "row": programs.call("schedule", {"timesteps": timesteps})["rows"]}
        step = partial(programs.call, "step", given)
        calls[f"volcast, {engine}"] = lambda step=step: step()["out"]  # type: ignore[misc]
    return calls


def case(name: str, folder: Path, threads: int, repeats: int) -> dict[str, Any]:
    """One line of the result."""
    with torch.no_grad():
        calls = {"mednist_gan": gan, "spade_gan": spade_gan, "mednist_ddpm": ddpm}[name](folder, threads)
        wanted = calls[MONAI]()
        errors = {key: relative_l2(call(), wanted) for key, call in calls.items() if key != MONAI}
        figures = in_turns(calls, repeats, key="call_ms")
    return {
        "benchmark": "zoo", "case": name, "environment": environment(threads), **figures,
        "relative_l2": errors,
    }  # fmt: skip


def _export(
    folder: Path, network: Any, noise: tuple[int, ...], image: tuple[int, ...], labels: int, sigmoid: bool
) -> None:
    axes = ("o0", "o1")
    mask = ConditionSpec(name="mask", dtype="int64", shape=axes, minimum=0, maximum=max(labels - 1, 0))
    bundle = GeneratorBundle(
        name="zoo", network=network, noise_shape=noise, image_shape=image, labels=labels, sigmoid=sigmoid,
        spacing_mm=(1.0, 1.0), conditions=(mask,) if labels else (), provenance={},
    )  # fmt: skip
    export_generator(bundle, folder, batch=(1, 4))


def _programs(folder: Path, engine: str, threads: int) -> Programs:
    return Programs(folder, read_manifest(folder), open_engine(engine, threads))


def _numpy(tensor: torch.Tensor) -> Array:
    array: Array = tensor.numpy()
    return array


def main(
    repeats: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    threads: Annotated[int, typer.Option(min=1, max=1024)] = physical_cores(),
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines to add to.")] = None,
) -> None:
    """Milliseconds a call: median (min..max), and the ratio round by round."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        run_cases(
            CASES, lambda name: case(name, Path(folder) / name, threads, repeats), output, key="call_ms"
        )


if __name__ == "__main__":
    typer.run(main)
