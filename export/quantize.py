"""INT8 post-training quantisation: a float32 artifact becomes one whose step and decoder run in int8.

The artifact samples by its own scheduler, from several seeds, conditions and weights of guidance, and at every step of
every sample the largest magnitude of what will be int8 is noted (`calibration`); then QuantizeLinear pairs go into the
programs (`qdq`), and biases take back what rounded weights shift (`bias_correction`). Nothing is trained, and random noise is never shown to the network but where a sampler starts.

Why no library does it, each tried on the bundled model's step (Conv3d, opset 21; errors: relative L2 of one call):
* NVIDIA ModelOpt 0.47 stops, since it wants every shape from ONNX's inference, which ends at GroupNormalization-21. It
  brings onnxruntime-gpu and CuPy (0.9 GB), and writes into the file that it reads.
* NNCF 3.4 stops there too. Given the shapes it works, with an error of 0.09 where this module's is 0.07, but ONNX
  Runtime 1.32 refuses what it writes.
* onnxruntime.quantization 1.32 must be given the types. It quantises a value for all its readers, norms and residuals
  too: 1.3 times the error of the same pairs on the layers alone. Symmetric results ONNX Runtime refuses, or OpenVINO
  2026.4 computes with three times the error.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx

from volcast.runtime.artifact import MANIFEST, digests, read_artifact
from volcast.runtime.atomic import atomic_folder
from volcast.runtime.external_data import external_data
from volcast.runtime.job import make_job
from volcast.runtime.pipeline import Model, load
from volcast.runtime.programs import ProgramName
from volcast.runtime.request import Settings, make_request
from volcast.runtime.sizes import smallest_batch, whole
from volcast.runtime.spec import ArtifactSpec, Precision, SlabSpec

from .bias_correction import corrected, corrected_inputs
from .calibration import GUIDANCE, CalibrationEngine, Eyes, draw_condition
from .qdq import Layer, activations, layers, quantized, save
from .slab_program import write_slabs

SAMPLES, SEED = 8, 1
"""By default. Seed 0 is what `sample` and `verify` take: what is judged should not be what was calibrated on."""
RESIDUALS = ("step",)
"""Programs whose residuals are rounded too. A decoder's reach the image with little after them: its MS-SSIM on the
bundled model goes from 0.9993 to 0.995, a step's makes no difference."""


def quantize(
    artifact: Path,
    folder: Path,
    *,
    samples: int = SAMPLES,
    steps: int | None = None,
    seed: int = SEED,
    decode: bool = True,
    condition: Mapping[str, object] | None = None,
    threads: int | None = None,
    replace: bool = False,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> ArtifactSpec:
    """Write the artifact in the folder `artifact` to `folder` with its step in int8, and return the manifest.

    Args:
        samples: 1..1000 to calibrate on; sample i has the seed `seed` + i and a condition of its own.
        steps: of each; None: the artifact's own.
        decode: the decoder in int8 too.
        condition: as in `Model.sample`, for all samples; fields left out are drawn from their range.
        threads: 1..1024; None: one a physical core.
        on_step: called with the steps done and to do, over all samples.

    Raises:
        ValueError: no float32 artifact, nothing in `step` to quantise, no samples, a condition that cannot be drawn,
            a `folder` that exists (and not `replace`), a network that gives no finite numbers; nothing is written.
    """
    spec = read_artifact(artifact)
    _check_precision(spec)
    samples = whole(samples)
    if not isinstance(samples, int) or not 1 <= samples <= 1000:
        raise ValueError(f"[quantize] samples={samples}: calibration needs 1..1000")
    models, chosen = _chosen(artifact, spec, decode)
    requests = _requests(spec, samples, steps, seed, condition or {})
    with atomic_folder(folder, replace=replace) as temporary:
        scratch = temporary / "calibration"
        scratch.mkdir()
        watched = {
            spec.programs[name].file: Eyes(
                largest=activations(each), mean=corrected_inputs(models[name], each)
            )
            for name, each in chosen.items()
        }
        engine = CalibrationEngine(watched, scratch, threads)
        _sample(Model(artifact, spec, engine), requests, on_step)
        shutil.rmtree(scratch)
        for name, model in models.items():
            file = spec.programs[name].file
            model = corrected(model, chosen[name], engine.means(file))
            models[name] = quantized(model, chosen[name], engine.largest[file])
            onnx.checker.check_model(models[name])
        _copy(artifact, spec, models, temporary)
        facts = {
            "quantization": "int8, symmetric; weights a scale a channel, activations a scale a tensor (largest magnitude); biases corrected",
            "quantization_layers": ", ".join(f"{name} {len(each)}" for name, each in chosen.items()),
            "quantization_data": (
                f"{samples} samples of {requests[0]['steps'] or spec.scheduler.steps} steps, seeds {seed}..{seed + samples - 1}"
            ),
            "quantization_calls": ", ".join(
                f"{name} {engine.calls[spec.programs[name].file]}" for name in chosen
            ),
            "quantization_volcast_version": version("volcast"),
            **{
                f"quantization_{name}_was": f"sha256 {spec.files[spec.programs[name].file]}"
                for name in chosen
            },
        }
        slabs = spec.slabs
        if slabs is not None and "decode" in models:
            # The same program in segments: an engine rounds at the same places whether it decodes whole or in slabs.
            try:
                slabs = write_slabs(
                    temporary / spec.programs["decode"].file, spec.latent_shape[0], len(spec.latent_shape) - 1
                )
            except ValueError as error:
                slabs, facts["slabs"] = None, str(error)[:200]
        result = _write_manifest(spec, models, slabs, facts, temporary)
        # An engine that refuses the result should do so here, not in production.
        _sample(load(temporary, threads=threads), [{**requests[0], "steps": 1}], lambda done, total: None)
    return result


def _check_precision(spec: ArtifactSpec) -> None:
    if spec.precision == "int8":
        raise ValueError(
            f"[quantize] {spec.name} is quantised already; give the float32 artifact that it came from"
        )
    if spec.reuses:
        raise ValueError(
            f"[quantize] {spec.name} has programs for reuse, which would stay float32 beside an int8 step; "
            "export the bundle without --reuse"
        )
    if spec.precision is not Precision.FP32:
        raise ValueError(
            f"[quantize] {spec.name} stores {spec.precision} weights, rounded once already; "
            "export the bundle with --precision fp32"
        )


def _chosen(
    artifact: Path, spec: ArtifactSpec, decode: bool
) -> tuple[dict[ProgramName, onnx.ModelProto], dict[ProgramName, tuple[Layer, ...]]]:
    names: list[ProgramName] = ["step", "decode"] if decode and "decode" in spec.programs else ["step"]
    models = {name: onnx.load(artifact / spec.programs[name].file) for name in names}
    chosen = {
        name: found for name, model in models.items() if (found := layers(model, residuals=name in RESIDUALS))
    }
    if "step" not in chosen:
        raise ValueError(
            f"[quantize] step of {spec.name} has no convolution or matrix product between its first and its last; "
            "there is nothing to quantise"
        )
    return {name: models[name] for name in chosen}, chosen


def _requests(
    spec: ArtifactSpec, samples: int, steps: int | None, seed: int, given: Mapping[str, object]
) -> list[dict[str, Any]]:
    """The arguments of `Model.sample_many` for every sample, checked as far as can be without running a program."""
    guided = any(condition.unconditional is not None for condition in spec.conditions)
    generator = np.random.default_rng(seed % 2**64)
    batch = smallest_batch(spec)
    requests = []
    for index in range(samples):
        condition = draw_condition(spec, given, generator)
        settings: Settings = {"steps": steps, "guidance": GUIDANCE[index % len(GUIDANCE)] if guided else None}
        make_job(spec, make_request(spec, seed + index, settings), batch, batch, condition, None)
        requests.append(
            {"n": batch, "seed": seed + index, "batch": batch, "condition": condition, **settings}
        )
    return requests


def _sample(model: Model, requests: Sequence[dict[str, Any]], on_step: Callable[[int, int], None]) -> None:
    for index, request in enumerate(requests):

        def after(done: int, total: int, index: int = index) -> None:
            on_step(index * total + done, len(requests) * total)

        for _ in model.sample_many(**request, on_step=after):
            pass


def _copy(
    artifact: Path, spec: ArtifactSpec, models: Mapping[ProgramName, onnx.ModelProto], folder: Path
) -> None:
    """The artifact's files, those of `models` written anew. What was built from it on or for a device stays behind, and
    so do the slabs of a decoder that is written anew."""
    files = {spec.programs[name].file for name in models}
    if "decode" in models and spec.slabs is not None:
        files |= {segment.program.file for segment in spec.slabs.segments}
    weights = {
        (PurePosixPath(file).parent / location).as_posix()
        for file in files
        for location in external_data(artifact / file)
    }
    for name in spec.files.keys() - files - weights:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact / name, folder / name)
    for name, model in models.items():
        save(model, folder / spec.programs[name].file)


def _write_manifest(
    spec: ArtifactSpec,
    models: Mapping[ProgramName, onnx.ModelProto],
    slabs: SlabSpec | None,
    facts: Mapping[str, str],
    folder: Path,
) -> ArtifactSpec:
    programs = {
        name: program.model_copy(update={"nodes": len(models[name].graph.node)})
        if name in models
        else program
        for name, program in spec.programs.items()
    }
    result = spec.model_copy(
        update={
            "precision": "int8",
            "programs": programs,
            "slabs": slabs,
            "provenance": {**spec.provenance, **facts},
            "files": digests(folder),
        }
    )
    (folder / MANIFEST).write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return read_artifact(folder)
