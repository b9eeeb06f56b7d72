"""Export of a token model: the bundle of a VQVAE and its transformer becomes an artifact folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from volcast.runtime.spec import Precision
from volcast.runtime.token_spec import TOKEN_FORMAT, TokenSpec

from .artifact import write_artifact
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
    own = {
        "format": TOKEN_FORMAT, "token_shape": bundle.token_shape, "num_codes": bundle.num_codes,
        "bos_token": bundle.bos_token, "order": bundle.order, "layers": len(bundle.transformer.blocks),  # type: ignore[arg-type]
    }  # fmt: skip
    return write_artifact(
        bundle, folder, lambda: capture_transformer(bundle, batch), TokenSpec, own, precision=precision, batch=batch,
        replace=replace, progress=progress,
    )  # fmt: skip
