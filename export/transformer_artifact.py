"""Export of a token model: the bundle of a VQVAE and its transformer becomes an artifact folder."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from volcast.runtime.artifact import MANIFEST, digests
from volcast.runtime.atomic import atomic_folder
from volcast.runtime.spec import Precision, ProgramSpec
from volcast.runtime.token_spec import TOKEN_FORMAT, TokenSpec

from .to_onnx import to_onnx
from .transformer_bundle import TransformerBundle
from .transformer_programs import capture_transformer

STAGES = ("capture", "prepare", "step", "decode", "encode", "manifest")


def export_transformer(
    bundle: TransformerBundle,
    folder: Path,
    *,
    precision: Precision = Precision.FP32,
    batch: tuple[int, int] = (1, 64),
    replace: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> TokenSpec:
    """Export `bundle` to `folder`, whole or not at all; `progress` is told each of `STAGES` that begins.

    Raises ValueError where the folder exists (and not `replace`) or cannot be written, the batch range is empty, or
    a network cannot be captured.
    """
    if not 1 <= batch[0] <= batch[1] <= 4096:
        raise ValueError(f"[export] batch={batch[0]}:{batch[1]}: need 1 <= smallest <= largest <= 4096")
    with atomic_folder(folder, replace=replace) as temporary:
        progress("capture")
        model = capture_transformer(bundle, batch)
        versions = {f"{name}_version": version(name) for name in ("volcast", "torch", "monai", "onnx")}
        programs: dict[str, ProgramSpec] = {}
        for name, program in model.programs.items():
            progress(name)
            path = temporary / f"{name}.onnx"
            to_onnx(
                program.graph,
                path,
                (program.inputs, program.outputs),
                precision=precision,
                metadata=versions,
            )
            programs[name] = ProgramSpec(
                file=path.name,
                inputs=program.inputs,
                outputs=program.outputs,
                nodes=program.nodes,
                nodes_before=program.nodes_before,
                flops=program.flops,
                flops_before=program.flops_before,
            )
        progress("manifest")
        spec = TokenSpec(
            format=TOKEN_FORMAT,
            name=bundle.name,
            precision=precision,
            axes=model.axes,
            programs=programs,  # type: ignore[arg-type]
            spacing_mm=bundle.spacing_mm,
            conditions=bundle.conditions,
            token_shape=bundle.token_shape,
            num_codes=bundle.num_codes,
            bos_token=bundle.bos_token,
            order=bundle.order,
            layers=len(bundle.transformer.blocks),  # type: ignore[arg-type]
            provenance={**bundle.provenance, **versions},
            files=digests(temporary),
        )
        (temporary / MANIFEST).write_text(spec.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return spec
