"""Export of a token model: the bundle of a VQVAE and its transformer becomes an artifact folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from volcast.runtime.artifact import MANIFEST, digests
from volcast.runtime.atomic import atomic_folder
from volcast.runtime.spec import Precision
from volcast.runtime.token_spec import TOKEN_FORMAT, TokenSpec

from .artifact import check_batch, tool_versions, write_programs
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
    check_batch(batch)
    with atomic_folder(folder, replace=replace) as temporary:
        progress("capture")
        model = capture_transformer(bundle, batch)
        versions = tool_versions()
        programs = write_programs(model, temporary, precision, versions, progress)
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
