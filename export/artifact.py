"""Export: a MONAI bundle becomes an artifact folder (ONNX programs and a manifest), written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from volcast.runtime.artifact import MANIFEST, digests
from volcast.runtime.atomic import atomic_folder
from volcast.runtime.generator_spec import GeneratorSpec
from volcast.runtime.spec import FORMAT, ArtifactSpec, Precision, ProgramSpec, SlabSpec
from volcast.runtime.token_spec import TokenSpec

from .bundle import Bundle
from .programs import PASSES, CapturedModel, capture_model
from .slab_program import write_slabs
from .to_onnx import to_onnx

if TYPE_CHECKING:
    from .generator_bundle import GeneratorBundle
    from .transformer_bundle import TransformerBundle

Written = TypeVar("Written", GeneratorSpec, TokenSpec)


def export_bundle(
    bundle: Bundle,
    folder: Path,
    *,
    precision: Precision = Precision.FP32,
    batch: tuple[int, int] = (1, 64),
    replace: bool = False,
    reuse: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> ArtifactSpec:
    """Export `bundle` to `folder` and return the manifest; `progress` is told the stage that begins.

    `reuse`: with the programs for `reuse` in `Model.sample`, which share the step's weights in a file beside it.

    Raises ValueError where the folder exists (and not `replace`) or cannot be written, the batch range is empty, a
    network cannot be captured, or (`reuse`) has no one tensor that comes up from below its top level.
    """
    check_batch(batch)
    with atomic_folder(folder, replace=replace) as temporary:
        progress("capture")
        model = capture_model(
            bundle.unet, bundle.autoencoder, bundle.latent_shape, bundle.conditions, batch, bundle.controls,
            bundle.encodings, reuse, bundle.text_encoder,
        )  # fmt: skip
        versions = tool_versions()
        passes = (*PASSES, "reuse") if reuse else PASSES
        provenance = {**bundle.provenance, "passes": " ".join(passes), **versions}
        programs = write_programs(model, temporary, precision, versions, progress)
        slabs: SlabSpec | None = None
        if "decode" in programs:
            progress("slabs")
            try:
                channels, *spatial = bundle.latent_shape
                slabs = write_slabs(temporary / programs["decode"].file, channels, len(spatial))
            except ValueError as error:  # the artifact is whole without, and `info` says why
                provenance["slabs"] = str(error)[:200]
        progress("manifest")
        spec = ArtifactSpec(
            format=FORMAT,
            name=bundle.name,
            precision=precision,
            axes=model.axes,
            programs=programs,  # type: ignore[arg-type]
            scheduler=bundle.scheduler,
            scale_factor=bundle.scale_factor,
            latent_shape=bundle.latent_shape,
            spacing_mm=bundle.spacing_mm,
            conditions=bundle.conditions,
            slabs=slabs,
            low_res=bundle.low_res,
            quality=bundle.quality,
            intensity=bundle.intensity,
            provenance=provenance,
            files=digests(temporary),
        )
        (temporary / MANIFEST).write_text(spec.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return spec


def write_artifact(
    bundle: GeneratorBundle | TransformerBundle,
    folder: Path,
    model: Callable[[], CapturedModel],
    spec: type[Written],
    own: Mapping[str, Any],
    *,
    precision: Precision,
    batch: tuple[int, int],
    replace: bool,
    progress: Callable[[str], None],
) -> Written:
    """Write what `model` captures of `bundle` to `folder`, whole or not at all; `own`: what this kind of manifest has besides.

    Raises ValueError where the folder exists (and not `replace`) or cannot be written, the batch range is empty, or
    a network cannot be captured.
    """
    check_batch(batch)
    with atomic_folder(folder, replace=replace) as temporary:
        progress("capture")
        captured = model()
        versions = tool_versions()
        programs = write_programs(captured, temporary, precision, versions, progress)
        progress("manifest")
        written = spec(
            name=bundle.name, precision=precision, axes=captured.axes, programs=programs,  # type: ignore[arg-type]
            spacing_mm=bundle.spacing_mm, conditions=bundle.conditions,
            provenance={**bundle.provenance, **versions}, files=digests(temporary), **own,
        )  # fmt: skip
        (temporary / MANIFEST).write_text(written.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return written


def check_batch(batch: tuple[int, int]) -> None:
    """ValueError: the smallest and largest batch that an export is to admit are none."""
    if not 1 <= batch[0] <= batch[1] <= 4096:
        raise ValueError(f"[export] batch={batch[0]}:{batch[1]}: need 1 <= smallest <= largest <= 4096")


def tool_versions() -> dict[str, str]:
    """What an artifact was made with, as its provenance tells it."""
    return {f"{name}_version": version(name) for name in ("volcast", "torch", "monai", "onnx")}


def write_programs(
    model: CapturedModel,
    folder: Path,
    precision: Precision,
    metadata: dict[str, str],
    progress: Callable[[str], None],
) -> dict[str, ProgramSpec]:
    """Each program as `<name>.onnx` in `folder`, and its description.

    Programs that run parts of the step once more read its weights, which then lie in a file of their own.
    """
    step = folder / "step.onnx"
    sharing = [name for name in model.programs if name.startswith("step_")]
    written: dict[str, ProgramSpec] = {}
    for name, program in model.programs.items():
        progress(name)
        path = folder / f"{name}.onnx"
        tensors = program.inputs, program.outputs
        to_onnx(
            program.graph, path, tensors, precision=precision, metadata=metadata,
            apart=bool(sharing) and path == step, weights_of=step if name in sharing else None,
        )  # fmt: skip
        written[name] = ProgramSpec(
            file=path.name,
            inputs=program.inputs,
            outputs=program.outputs,
            nodes=program.nodes,
            nodes_before=program.nodes_before,
            flops=program.flops,
            flops_before=program.flops_before,
        )
    return written
