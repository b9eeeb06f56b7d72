"""`volcast likelihood`, and what `volcast sample` needs of token models. Heavy imports stand inside the functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .engine_name import EngineName

if TYPE_CHECKING:
    from .token_choice import ChoiceSettings
    from .token_model import TokenModel


def choice_settings(
    model: object, temperature: float | None, top_k: int | None, top_p: float | None, other: Mapping[str, Any]
) -> ChoiceSettings:
    """How `sample` draws tokens. `other`: the options of diffusion models, None where not given.

    Raises ValueError: an option that is for the other kind of model.
    """
    from .token_model import TokenModel

    choice: ChoiceSettings = {"top_k": top_k, "top_p": top_p}
    if temperature is not None:
        choice["temperature"] = temperature
    if isinstance(model, TokenModel):
        given = [f"--{name}" for name, value in other.items() if value]
        if given:
            raise ValueError(
                f"[sample] {', '.join(given)}: {model.spec.name} samples tokens; leave it out (--temperature, --top-k "
                "and --top-p are for it)"
            )
        return choice
    if any(value is not None for value in choice.values()):
        raise ValueError(
            "[sample] --temperature, --top-k, --top-p are for token models (a VQVAE with a transformer); leave them out"
        )
    return choice


def likelihood(
    artifact: Annotated[Path, typer.Argument(help="Folder of a token model, as `volcast export` wrote it.")],
    images: Annotated[
        list[Path], typer.Argument(help="NIfTI files, or folders of them, with the intensities of training.")
    ],
    against: Annotated[
        Path | None, typer.Option(help="Folder of images that are unlike those of training: prints the AUC.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="NIfTI file: log p at each voxel of the one image.")
    ] = None,
    condition: Annotated[
        list[str] | None, typer.Option("--condition", "-c", help="As in `volcast sample`; repeatable.")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="What runs the networks.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """How likely a token model finds images: log p of each image and token, for out-of-distribution detection."""
    from .artifact import read_manifest
    from .condition_text import parse_conditions
    from .token_model import load_tokens
    from .volume import check_nifti_path

    known, unlike = nifti_files(images), [] if against is None else nifti_files([against])
    if output is not None:
        check_nifti_path(output)
        if len(known) != 1 or unlike:
            raise ValueError(
                f"[likelihood] --output {output}: holds the map of one image; give one, not {len(known)}"
            )
    model = load_tokens(artifact, read_manifest(artifact), engine, threads)
    given = parse_conditions(model.spec, condition or ())
    rows = [_row(model, path, given, output) for path in [*known, *unlike]]
    scores = [float(row["log_likelihood"]) for row in rows]
    found = auc(scores[: len(known)], scores[len(known) :]) if unlike else None
    if as_json:
        typer.echo(json.dumps({"images": rows} | ({} if found is None else {"auc": found})))
        return
    for row in rows:
        typer.echo(
            f"{row['path']}: log p {row['log_likelihood']:.2f}, {row['nats_per_token']:.4f} nats a token"
        )
    if found is not None:
        typer.echo(f"AUC {found:.4f} ({len(known)} images, {len(unlike)} unlike them)")


def nifti_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and those in the folders by name (ValueError: none)."""
    found: list[Path] = []
    for path in paths:
        inside = (
            sorted(one for one in path.iterdir() if one.name.endswith((".nii", ".nii.gz")))
            if path.is_dir()
            else [path]
        )
        if not inside:
            raise ValueError(f"[likelihood] {path} holds no .nii or .nii.gz file; give another folder")
        found += inside
    return found


def auc(known: Sequence[float], unlike: Sequence[float]) -> float:
    """The chance that a known image is likelier than one unlike it, ties half: the area under the ROC curve."""
    import numpy as np

    difference = np.subtract.outer(np.asarray(known), np.asarray(unlike))
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def _row(model: TokenModel, path: Path, condition: Mapping[str, Any], output: Path | None) -> dict[str, Any]:
    import numpy as np

    from .volume import Volume, read_nifti

    image = read_nifti(path)
    array = (
        image.array[..., 0] if len(model.spec.token_shape) == 2 and image.array.shape[2] == 1 else image.array
    )
    if array.shape != model.image_shape[1:]:
        raise ValueError(
            f"[likelihood] {path} has shape {array.shape}: need {model.image_shape[1:]}; crop, pad or resample it"
        )
    (tokens,) = model.likelihood(array, condition=condition)
    if output is not None:
        voxels = tokens.astype(np.float32)
        for axis, size in enumerate(array.shape):
            voxels = np.repeat(voxels, size // voxels.shape[axis], axis=axis)
        Volume(voxels.reshape(image.array.shape), image.affine, image.spacing_mm).save(
            output, "log p of tokens"
        )
    return {"path": str(path), "log_likelihood": float(tokens.sum()), "nats_per_token": float(-tokens.mean())}
