"""`volcast likelihood`. Heavy imports stand inside the functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .engine_name import EngineName

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .pipeline import Model
    from .token_model import TokenModel
    from .volume import Volume

    Row = tuple[dict[str, Any], NDArray[Any]]


def likelihood(
    artifact: Annotated[Path, typer.Argument(help="Folder that `volcast export` wrote.")],
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
    steps: Annotated[
        int | None, typer.Option(help="Diffusion models: timesteps of the bound; left out: the model's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Diffusion models: of the noise; left out: 0.")] = None,
    engine: Annotated[EngineName, typer.Option(help="What runs the networks.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Left out: one a physical core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """How likely a model finds images, in nats, for out-of-distribution detection: log p, or a bound of it (diffusion)."""
    from .condition_text import files_of, parse_conditions
    from .generator_model import GeneratorModel
    from .pipeline import load
    from .roc import roc
    from .sample_output import check_apart, output_files
    from .token_model import TokenModel
    from .volume import read_nifti

    known, unlike = nifti_files(images), [] if against is None else nifti_files([against])
    if output is not None:
        output_files(output, 1, None)
        check_apart([output], [*known, *files_of(condition or ())])
        if len(known) != 1 or unlike:
            raise ValueError(
                f"[likelihood] --output {output}: holds the map of one image; give one, not {len(known) + len(unlike)}"
            )
    if against is not None and min(len(known), len(unlike)) < 2:
        raise ValueError(
            f"[likelihood] --against: {len(known)} images and {len(unlike)}: need 2 or more of each"
        )
    model = load(artifact, engine, threads)
    if isinstance(model, GeneratorModel):
        raise ValueError(  # noqa: TRY004  (an artifact's, not a caller's)
            f"[likelihood] {model.spec.name} makes an image in one pass and has no log p; give a diffusion or token model"
        )
    given = parse_conditions(model.spec, condition or ())
    if isinstance(model, TokenModel) and (steps is not None or seed is not None):
        raise ValueError(f"[likelihood] --steps, --seed: {model.spec.name} has log p itself; leave them out")
    unit = "token" if isinstance(model, TokenModel) else "value"
    rows = []
    for path in (*known, *unlike):
        image = read_nifti(path)
        try:
            row, voxels = (
                _tokens(model, image, given)
                if isinstance(model, TokenModel)
                else _bound(model, image, given, seed or 0, steps)
            )
        except ValueError as error:
            reason = str(error).removeprefix("[likelihood] ")
            raise ValueError(f"[likelihood] {path}: {reason}") from error
        rows.append({"path": str(path)} | row)
        if not as_json:  # each at once: what is found is not lost where a later file fails
            typer.echo(
                f"{path}: log p {row['log_likelihood']:.2f}, {row[f'nats_per_{unit}']:.4f} nats a {unit}"
            )
        if output is not None:
            _save(voxels, image, output)
    scores = [-float(row[f"nats_per_{unit}"]) for row in rows]
    found = roc(scores[: len(known)], scores[len(known) :]) if unlike else None
    if as_json:
        interval = {} if found is None else {"auc": found.auc, "auc_interval": [found.low, found.high]}
        typer.echo(json.dumps({"images": rows} | interval))
        return
    if found is not None:
        typer.echo(
            f"AUC {found.auc:.4f}, 95 % interval {found.low:.4f}..{found.high:.4f} "
            f"({len(known)} images, {len(unlike)} unlike them)"
        )


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


def _tokens(model: TokenModel, image: Volume, condition: Mapping[str, Any]) -> Row:
    (tokens,) = model.likelihood(image, condition=condition)
    return {"log_likelihood": float(tokens.sum()), "nats_per_token": float(-tokens.mean())}, tokens


def _bound(model: Model, image: Volume, condition: Mapping[str, Any], seed: int, steps: int | None) -> Row:
    (values,) = model.likelihood(image, seed=seed, condition=condition, steps=steps)
    return {"log_likelihood": float(values.sum()), "nats_per_value": float(-values.mean())}, values.sum(0)


def _save(values: NDArray[Any], image: Volume, output: Path) -> None:
    """Log p on the image's grid: that of each place of the latent's or the tokens' grid, shared evenly by its voxels."""
    import numpy as np

    from .volume import Volume

    voxels = values.astype(np.float32)
    for axis, size in enumerate(voxels.shape):
        factor = image.array.shape[axis] // size
        voxels = np.repeat(voxels / np.float32(factor), factor, axis=axis)
    voxels = voxels.reshape(image.array.shape)
    Volume(voxels, image.affine, image.spacing_mm).save(output, "log p")
