"""The command `evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm


def evaluate(
    samples: Annotated[
        Path, typer.Argument(help="Folder of .nii, .nii.gz or .png files, or one that `volcast generate` wrote.")
    ],
    real: Annotated[Path, typer.Argument(help="Folder of real images of the same shape and grey values.")],
    plot: Annotated[Path | None, typer.Option(help="Also write a picture (.png) of the distributions.")] = None,
    seed: Annotated[int, typer.Option(help="Of the halves that intervals stand on.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Compare samples with real images: Fréchet distance, MMD, MS-SSIM, PSNR, SSIM; flags copies and low diversity.

    Images whose names agree are compared pair by pair, too.
    """
    from volcast.runtime.picture import check_png_path

    if plot is not None:
        import matplotlib  # noqa: F401  (missing: said before the work)

        check_png_path(plot)
    from .evaluation import STAGES
    from .evaluation import evaluate as compare
    from .evaluation_images import read_images

    stages = ["read", *STAGES]
    with tqdm(total=len(stages), desc="evaluate", file=sys.stderr, disable=None, leave=False) as bar:

        def on_stage(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update(stages.index(stage) - bar.n)

        on_stage("read")
        ours, theirs = read_images(samples), read_images(real)
        found = compare(ours, theirs, seed, on_stage)
    if plot is not None:
        from .evaluation_plot import plot as draw

        draw(found, ours, theirs, plot)
    print(json.dumps(found.as_dict(), allow_nan=False) if as_json else found.as_text())
