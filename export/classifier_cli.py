"""The command `classifier`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli import BundlePath, Config, Json, Settings, config_settings, weight_files


def classifier(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact of a diffusion model.")],
    bundle: BundlePath,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the artifact with the classifier.")
    ],
    config: Config = None,
    weights: Annotated[list[str], typer.Option(help="classifier=FILE, instead of the config's.")] = [],  # noqa: B006
    settings: Settings = [],  # noqa: B006
    force: Annotated[bool, typer.Option(help="Replace the artifact in OUTPUT.")] = False,
    as_json: Json = False,
) -> None:
    """Copy an artifact and add a classifier of noisy images, for `volcast sample --label` and `volcast anomaly --label`."""
    if output.exists() and not force:
        raise ValueError(f"[classifier] {output} exists: remove it, choose another name, or pass --force")
    from volcast.runtime.artifact import read_artifact

    from .classifier_bundle import read_classifier
    from .gradient import add_classifier

    files, values = weight_files(weights), config_settings(settings)
    latent_shape = read_artifact(artifact).latent_shape
    network, provenance = read_classifier(bundle, latent_shape, config=config, weights=files, settings=values)
    spec = add_classifier(artifact, network, output, replace=force, provenance=provenance)
    gradient = spec.programs["gradient"]
    classes = gradient.outputs[1].shape[1]
    print(
        spec.model_dump_json()
        if as_json
        else f"{output}: {spec.name} with a classifier of {classes} classes, gradient {gradient.nodes} nodes"
    )
