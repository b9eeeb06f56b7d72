"""verify: an artifact against MONAI's own code running the bundle, step by step and end to end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets.vqvae import VQVAE
from numpy.typing import NDArray
from torch import nn

from volcast.runtime.artifact import read_artifact
from volcast.runtime.denoiser import step_inputs
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.intensity import of_network, written
from volcast.runtime.job import Job, make_job
from volcast.runtime.noise import request_noise
from volcast.runtime.programs import Programs
from volcast.runtime.request import make_request
from volcast.runtime.sampling import Watch
from volcast.runtime.sizes import smallest_batch
from volcast.runtime.spec import ArtifactSpec, ConditionSpec, Precision

from .bundle import Bundle
from .monai_run import MonaiRun, run_monai
from .similarity import ms_ssim, psnr, relative_l2
from .verification import VOLUME, Check, Verification, ms_ssim_budget, network_budget

Array = NDArray[np.generic]

COMPARED = 7
"""Network calls compared one by one, evenly from the first to the last."""


def verify(
    artifact: Path,
    bundle: Bundle,
    *,
    engine: str = "auto",
    threads: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    condition: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    negative: Mapping[str, Any] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Compare the artifact in the folder `artifact` with MONAI 1.6.1 running `bundle` from the same noise.

    MONAI samples once; on latents of that run the artifact's network (schedule, prepare, step), decoder and encoder
    are compared with MONAI's, then the artifact samples by itself (`compat="monai-1.6"`) for the whole volume.

    Args:
        engine, threads: as in `volcast.load`.
        steps, seed, condition, guidance, negative: as in `Model.sample`; steps None: the bundle's.
        on_step: called with the network calls done and to do, of both samplers.

    Raises:
        ValueError: a bad artifact or argument; an artifact whose latent, conditions or programs are not the bundle's.
    """
    spec = read_artifact(artifact)
    _check_fit(spec, bundle)
    steps = bundle.scheduler.steps if steps is None else steps
    request = make_request(spec, seed, {"steps": steps, "guidance": guidance, "compat": "monai-1.6"})
    samples = range(smallest_batch(spec))
    job = make_job(spec, request, len(samples), len(samples), condition, None, negative)
    opened = open_engine(engine, threads)
    programs = Programs(artifact, spec, opened)

    calls = len(job.plan)
    conditional = job.conditions(samples)
    unconditional = job.negative(samples)
    monai = run_monai(
        bundle,
        lambda step: request_noise(seed, samples, step, job.shape),
        conditional,
        steps=steps,
        guidance=guidance,
        unconditional=unconditional,
        keep={round(i * (calls - 1) / (COMPARED - 1)) for i in range(COMPARED)},
        on_step=lambda done: on_step(done, 2 * calls),
    )
    branches = {"conditional": _step_inputs(spec, programs, conditional)}
    if unconditional is not None:
        branches["unconditional"] = _step_inputs(spec, programs, unconditional)
    checks = [_same_weights(spec, bundle), _same_timesteps(job, monai)]
    checks += _network_checks(spec, programs, bundle, branches, monai)
    checks += _autoencoder_checks(spec, programs, bundle, monai, conditional)
    try:
        watch = Watch(on_step=lambda done, _: on_step(calls + done, 2 * calls))
        sampler = opened.sampler(artifact, spec, programs)
        volume, _ = next(sampler.run(job, [samples], None, watch))
        # In the network's intensities, where an error of 1 HU is not small beside an offset of 1000.
        image = of_network(spec.intensity, written(spec.intensity, monai.image))
        checks += _volume_checks(spec, of_network(spec.intensity, volume), image)
    except ValueError as error:
        # Every argument was checked and every program has run: what is left is a trajectory that is not finite.
        checks += [Check(name="volume", value=math.nan, budget=VOLUME, note=str(error))]
    guided = "" if guidance is None else f", guidance {guidance:g}"
    subject = (
        f"{spec.name}: {spec.precision} weights on {opened.name} against MONAI, "
        f"{steps} {bundle.scheduler.scheduler} steps{guided}, seed {seed}"
    )
    return Verification(subject=subject, checks=tuple(checks))


def _check_fit(spec: ArtifactSpec, bundle: Bundle) -> None:
    def inputs(conditions: tuple[ConditionSpec, ...]) -> str:
        described = (f"{c.name} {c.dtype}[{','.join(map(str, c.shape))}]" for c in conditions)
        return ", ".join(sorted(described)) or "none"

    facts = {
        "latent_shape": (list(spec.latent_shape), list(bundle.latent_shape)),
        "conditions": (inputs(spec.conditions), inputs(bundle.conditions)),
        "autoencoder": ("decode" in spec.programs, bundle.autoencoder is not None),
        "scheduler": (spec.scheduler.scheduler, bundle.scheduler.scheduler),
        "intensity": (spec.intensity, bundle.intensity),
    }
    for fact, (ours, theirs) in facts.items():
        if ours != theirs:
            raise ValueError(
                f"[verify] {fact}: {ours} in the artifact {spec.name!r}, {theirs} in the bundle {bundle.name!r}; "
                "give the bundle (and --set) that the artifact was exported from"
            )


def _same_weights(spec: ArtifactSpec, bundle: Bundle) -> Check:
    keys = [key for key in bundle.provenance if key.endswith("_sha256") and key != "config_sha256"]
    other = [key for key in keys if spec.provenance.get(key) != bundle.provenance[key]]
    names = " and ".join(key.removesuffix("_sha256") for key in other)
    note = (
        f"the artifact's {names} came from other weight files than the bundle's: different models"
        if other
        else ""
    )
    return Check(name="weight files that differ", value=len(other), budget=0, note=note)


def _same_timesteps(job: Job, monai: MonaiRun) -> Check:
    ours, theirs = job.plan.timesteps.astype(np.float32), np.array(monai.timesteps, np.float32)
    differing = int((ours != theirs).sum()) if ours.shape == theirs.shape else max(len(ours), len(theirs))
    return Check(name="timesteps that differ", value=differing, budget=0)


def _network_checks(
    spec: ArtifactSpec,
    programs: Programs,
    bundle: Bundle,
    branches: Mapping[str, Mapping[str, Array]],
    monai: MonaiRun,
) -> list[Check]:
    rows = programs.call("schedule", {"timesteps": np.array(monai.timesteps, np.float32)})["rows"]
    budget = network_budget(spec.precision, _stored(bundle.unet))
    checks = []
    for index, call in sorted(monai.calls.items()):
        row = np.repeat(rows[index : index + 1], len(call.x), axis=0)
        errors = []
        for branch, inputs in branches.items():
            out = programs.call("step", {"x": call.x, "row": row, **inputs})["out"]
            errors.append(relative_l2(out, getattr(call, branch)))
        # np.max, because max() passes over NaN.
        name = f"network, step {index + 1}, t={call.t:g}"
        checks.append(Check(name=name, value=float(np.max(errors)), budget=budget))
    return checks


def _step_inputs(spec: ArtifactSpec, programs: Programs, values: Mapping[str, Array]) -> dict[str, Array]:
    constants = programs.call("prepare", values) if "prepare" in spec.programs else {}
    return step_inputs(spec, values, constants)


def _autoencoder_checks(
    spec: ArtifactSpec,
    programs: Programs,
    bundle: Bundle,
    monai: MonaiRun,
    conditional: Mapping[str, Array],
) -> list[Check]:
    if bundle.autoencoder is None:
        return []
    weights = _stored(bundle.autoencoder)
    budget = network_budget(spec.precision, weights)
    image = programs.call("decode", {"z": monai.z, **conditional})["image"]
    checks = [Check(name="decode", value=relative_l2(image, monai.image), budget=budget)]
    if "encode" not in spec.programs:
        return checks
    # An autoencoder may read other channels than it writes (MAISI's masks); any volume of that many will do.
    channels = spec.programs["encode"].inputs[0].shape[1]
    assert isinstance(channels, int)
    given = np.ascontiguousarray(monai.image[:, [i % monai.image.shape[1] for i in range(channels)]])
    encoded = programs.call("encode", {"image": given})
    with torch.no_grad():
        tensor = torch.from_numpy(given)
        wanted = (
            (bundle.autoencoder.encode_stage_2_inputs(tensor),)
            if isinstance(bundle.autoencoder, VQVAE)
            else bundle.autoencoder.encode(tensor)  # type: ignore[operator]
        )
    # An int8 artifact's encoder is float32.
    budget = network_budget(Precision.FP32 if spec.precision == "int8" else spec.precision, weights)
    for name, words, tensor in zip(("z_mu", "z_sigma"), ("mean", "deviation"), wanted, strict=False):
        value = relative_l2(encoded[name], tensor.numpy())
        checks.append(Check(name=f"encode, {words}", value=value, budget=budget))
    return checks


def _volume_checks(spec: ArtifactSpec, volume: Array, wanted: Array) -> list[Check]:
    error = relative_l2(volume, wanted)
    if spec.precision is Precision.FP32:
        return [
            Check(name="volume", value=error, budget=VOLUME),
            Check(name="volume, PSNR in dB", value=psnr(volume, wanted), budget=None),
        ]
    return [
        Check(
            name="volume, MS-SSIM",
            value=ms_ssim(volume, wanted),
            budget=ms_ssim_budget(spec.precision),
            at_least=True,
        ),
        Check(name="volume, PSNR in dB", value=psnr(volume, wanted), budget=None),
        Check(name="volume, relative L2", value=error, budget=None),
    ]


def _stored(network: nn.Module) -> int:
    """How many weights an export stores in its precision: those of two or more axes."""
    return sum(parameter.ndim >= 2 for parameter in network.parameters())
