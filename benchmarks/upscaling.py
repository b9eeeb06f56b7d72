"""How much does a guided step of a text-conditioned model, a step of an upscaler, and a sweep of weights cost beside MONAI?

    python -m volcast.benchmarks.upscaling [--repeats 15] [--threads 1] [-o results/upscaling.jsonl]

Networks of published shapes, narrowed, with random weights, float32: the chest X-ray model's UNet with 77 tokens of CLIP's
encoder, both branches of guidance a step (MONAI: one call of two), and the UNet of MONAI's super-resolution tutorial with a
class embedding. The sweep is the bundled model's: ten weights of one sample, MONAI's inferer once a weight, volcast in one
call. All in turns in one process; `prepare_ms` is what a request pays once.
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
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from numpy.typing import NDArray

from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle, read_bundle
from volcast.export.bundle_conditions import network_conditions
from volcast.export.bundle_low_res import LowRes
from volcast.export.monai_run import run_monai
from volcast.export.similarity import relative_l2
from volcast.export.text_encoder import ClipConfig, ClipTextEncoder, TextPlan
from volcast.runtime.conditions import resolve
from volcast.runtime.default_artifact import BUNDLE, default_artifact
from volcast.runtime.engine_auto import open_engine, physical_cores
from volcast.runtime.noise import request_noise
from volcast.runtime.pipeline import load
from volcast.runtime.programs import Programs
from volcast.runtime.sampling import prepared
from volcast.runtime.sizes import latent_sizes
from volcast.runtime.spec import LowResSpec, SchedulerSpec

from .bench import environment, measure
from .beside_monai import MONAI, in_turns, randomised, run_cases

Array = NDArray[np.generic]
ENGINES = ("openvino", "onnxruntime")
TIMESTEP = 500.0
SWEEP_STEPS = 5
TUTORIAL = {"spatial_dims": 2, "in_channels": 4, "out_channels": 3, "num_res_blocks": 2, "num_class_embeds": 1000,
            "channels": (64, 64, 128, 256), "attention_levels": (False, False, True, True),
            "num_head_channels": (0, 0, 64, 64), "with_conditioning": False, "cross_attention_dim": None}  # fmt: skip
CHEST = {"spatial_dims": 2, "in_channels": 3, "out_channels": 3, "num_res_blocks": 2, "num_class_embeds": None,
         "channels": (64, 128, 192), "attention_levels": (False, True, True), "num_head_channels": (0, 128, 192),
         "with_conditioning": True, "cross_attention_dim": 1024}  # fmt: skip
CLIP = ClipConfig(
    model_type="clip_text_model", vocab_size=1000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
    num_attention_heads=16, hidden_act="gelu",
)  # fmt: skip


def make_bundle(name: str) -> Bundle:
    """The models of the cases `text` and `upscaler`, without autoencoder: a step needs none."""
    arguments = CHEST if name == "text" else TUTORIAL
    conditions = network_conditions(arguments, 3)
    low_res = encoder = None
    if name == "text":
        conditions = (TextPlan(folder=Path(), config=CLIP).condition(),)
        encoder = randomised(ClipTextEncoder(CLIP))
    else:
        low_res = LowRes(spec=LowResSpec(), highest=350, usual=20, found="")
        conditions = low_res.conditions(conditions)
    return Bundle(
        name=name,
        unet=randomised(DiffusionModelUNet(**arguments)),
        autoencoder=None,
        scheduler=SchedulerSpec(),
        scale_factor=1.0,
        latent_shape=(3, 32, 32),
        spacing_mm=(1.0, 1.0),
        conditions=conditions,
        provenance={},
        low_res=None if low_res is None else low_res.spec,
        text_encoder=encoder,
    )


def monai_step(bundle: Bundle, x: Array, branches: list[Mapping[str, Array]]) -> Callable[[], Array]:
    """One call of MONAI's UNet on all branches, the unconditional one first, as its inferer makes it."""
    tensor = torch.from_numpy(np.repeat(x, len(branches), 0))
    given: dict[str, torch.Tensor] = {}
    if bundle.text_encoder is not None:
        tokens = torch.from_numpy(np.concatenate([one["text"] for one in branches]))
        given["context"] = bundle.text_encoder(tokens)
    else:
        tensor = torch.cat([tensor, torch.from_numpy(branches[0]["low_res"])], 1)
        given["class_labels"] = torch.from_numpy(branches[0]["tau"])

    @torch.no_grad()
    def run() -> Array:
        out: Array = bundle.unet(tensor, timesteps=torch.tensor([TIMESTEP]), **given).numpy()
        return out

    return run


def step_case(name: str, artifact: Path, threads: int, repeats: int) -> dict[str, Any]:
    """One line of the result: a step of `text` or `upscaler`."""
    bundle = make_bundle(name)
    spec = export_bundle(bundle, artifact)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, *bundle.latent_shape)).astype(np.float32)
    if name == "text":
        given: list[dict[str, Any]] = [{"text": rng.integers(0, 1000, 77)} for _ in range(2)]
    else:
        given = [{"low_res": rng.random((1, 32, 32))}]
    _, sizes = latent_sizes(spec)
    branches: list[Mapping[str, Array]] = [
        {key: value[None] for key, value in resolve(spec, one, sizes).values.items()} for one in given
    ]
    calls: dict[str, Callable[[], Any]] = {MONAI: monai_step(bundle, x, branches)}
    wanted = calls[MONAI]()
    prepares: dict[str, Callable[[], Any]] = {}
    errors = {}
    for engine in ENGINES:
        programs = Programs(artifact, spec, open_engine(engine, threads))
        row = programs.call("schedule", {"timesteps": np.array([TIMESTEP], np.float32)})["rows"]
        prepares[engine] = partial(prepared, spec, programs, branches[0])
        inputs = [{"x": x, "row": row, **prepared(spec, programs, one)} for one in branches]
        step = programs.open("step", {key: value.shape for key, value in inputs[0].items()})
        calls[f"volcast, {engine}"] = partial(
            lambda step, inputs: [step(one)["out"] for one in inputs], step, inputs
        )
        errors[engine] = relative_l2(np.concatenate(calls[f"volcast, {engine}"]()), wanted)
    ours = spec.programs["step"]
    once = measure(list(prepares.values()), warmup=1, repeats=5)
    return {
        "benchmark": "upscaling", "case": name, "environment": environment(threads),
        "gflop": {"MONAI": round(ours.flops_before / 1e9, 3), "step": round(ours.flops / 1e9, 3)},
        "prepare_ms": {key: round(1e3 * min(taken), 2) for key, taken in zip(prepares, once, strict=True)},
        **in_turns(calls, repeats, warmup=1), "relative_l2": errors,
    }  # fmt: skip


def sweep_case(threads: int, repeats: int) -> dict[str, Any]:
    """Ten weights of the bundled model, a few steps each and the decode."""
    bundle, weights = read_bundle(BUNDLE), [float(weight) for weight in range(1, 11)]
    model = load(default_artifact(), "openvino", threads)
    _, sizes = latent_sizes(model.spec)
    shown = {key: value[None] for key, value in resolve(model.spec, {"anterior": 0.8}, sizes).values.items()}
    null = {key: np.full_like(value, -1) for key, value in shown.items()}

    def monai() -> list[Array]:
        noise = partial(request_noise, 0, range(1), shape=bundle.latent_shape)
        return [
            run_monai(
                bundle,
                lambda step: noise(step),
                shown,
                steps=SWEEP_STEPS,
                guidance=weight,
                unconditional=null,
            ).image
            for weight in weights
        ]

    def ours() -> list[Array]:
        volumes = model.sample_many(
            1, guidance=weights, condition={"anterior": 0.8}, steps=SWEEP_STEPS, compat="monai-1.6"
        )
        return [volume.array for volume in volumes]

    error = relative_l2(np.stack(ours()), np.concatenate(monai())[:, 0])
    calls: dict[str, Callable[[], Any]] = {MONAI: monai, "volcast, openvino": ours}
    return {
        "benchmark": "upscaling", "case": "sweep", "environment": environment(threads), "steps": SWEEP_STEPS,
        **in_turns(calls, max(3, repeats // 5), warmup=1), "relative_l2": {"openvino": error},
    }  # fmt: skip


def main(
    repeats: Annotated[int, typer.Option(min=1, max=10_000)] = 15,
    threads: Annotated[int, typer.Option(min=1, max=1024)] = physical_cores(),
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines to add to.")] = None,
) -> None:
    """Milliseconds of each contestant, and MONAI's ratio round by round."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:

        def case(name: str) -> dict[str, Any]:
            if name == "sweep":
                return sweep_case(threads, repeats)
            return step_case(name, Path(folder) / name, threads, repeats)

        run_cases(("text", "upscaler", "sweep"), case, output)


if __name__ == "__main__":
    typer.run(main)
