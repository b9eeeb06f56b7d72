"""What `volcast sample` and `volcast request` need of images: the one to start from, the part to paint anew."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .inpaint import Inpaint


Mask = Annotated[
    Path | None,
    typer.Option(help="With --image: NIfTI mask, not 0 where to paint anew (RePaint); the rest stays."),
]
Resamples = Annotated[
    int | None, typer.Option(help="With --inpaint: runs of each stretch of steps; left out: 4.")
]
JumpLength = Annotated[int | None, typer.Option(help="With --inpaint: steps of such a stretch; left out: 1.")]
Paste = Annotated[bool, typer.Option(help="With --inpaint: put the image's own voxels back.")]


def read_inpaint(
    image: Path | None, mask: Path | None, resamples: int | None, jump_length: int | None, paste: bool
) -> Inpaint | None:
    """`--inpaint` with its options (ValueError: options without it, or it without `--image`)."""
    from .inpaint import Inpaint
    from .volume import read_nifti

    how = {"resamples": resamples, "jump_length": jump_length}
    given = {name: number for name, number in how.items() if number is not None}
    if mask is None:
        names = [f"--{name.replace('_', '-')}" for name in given] + ([] if paste else ["--no-paste"])
        if names:
            raise ValueError(
                f"[sample] {', '.join(names)}: without --inpaint FILE; give it, or leave these out"
            )
        return None
    if image is None:
        raise ValueError("[sample] --inpaint: without --image FILE; give the image that the mask is of")
    return Inpaint(read_nifti(mask), paste=paste, **given)
