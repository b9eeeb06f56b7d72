"""Pictures of volumes: three orthogonal planes as radiology shows them, and mosaics of many volumes.

Axial: the patient's right on the left of the picture, the front at the top. Coronal: right on the left, head at the
top. Sagittal: front on the left, head at the top. Pixels are square: slices are scaled by their spacing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .atomic import atomic_file
from .volume import Volume

_GAP = 4
_CAPTION = 14


def planes(volume: Volume) -> list[tuple[NDArray[np.float32], tuple[float, float]]]:
    """The middle axial, coronal and sagittal slices of channel 0, the axial one alone if the volume is 2D.

    Each with rows from the top, and the millimetres of a pixel across and down.
    """
    # RAS+ after this: axis 0 to the patient's right, 1 to the front, 2 to the head.
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.channels[0], volume.affine))
    array = np.asarray(image.dataobj)
    x, y, z = (float(size) for size in image.header.get_zooms())
    i, j, k = (size // 2 for size in array.shape)
    axial = array[::-1, ::-1, k].T, (x, y)
    if len(volume.spacing_mm) == 2:
        return [axial]
    return [axial, (array[::-1, j, ::-1].T, (x, z)), (array[i, ::-1, ::-1].T, (y, z))]


def picture(volume: Volume, scale: float = 3.0) -> Image.Image:
    """The planes side by side, 8 bits grey; `scale` is in pixels per smallest voxel edge, at most 64.

    The grey range is the volume's 0.5th to 99.5th percentile, the same for all planes.
    """
    if not 0 < scale <= 64:
        raise ValueError(f"[picture] scale={scale}: need more than 0, at most 64")
    low, high = np.percentile(volume.channels[0], [0.5, 99.5])
    width = max(float(high - low), 1e-12)
    slices = planes(volume)
    pixels = scale / min(edge for _, edges in slices for edge in edges)
    tiles = []
    for plane, (across, down) in slices:
        grey = (np.clip((plane - low) / width, 0, 1) * 255).round().astype(np.uint8)
        rows, columns = plane.shape
        size = (max(1, round(columns * across * pixels)), max(1, round(rows * down * pixels)))
        tiles.append(Image.fromarray(np.ascontiguousarray(grey)).resize(size, Image.Resampling.BILINEAR))
    canvas = Image.new("L", (sum(t.width + _GAP for t in tiles) - _GAP, max(t.height for t in tiles)))
    left = 0
    for tile in tiles:
        canvas.paste(tile, (left, (canvas.height - tile.height) // 2))
        left += tile.width + _GAP
    return canvas


def mosaic(volumes: Sequence[Volume], captions: Sequence[str] = (), scale: float = 3.0) -> Image.Image:
    """One row a volume: its caption above its planes. ValueError without volumes or with too many captions."""
    if not volumes or len(captions) > len(volumes):
        raise ValueError(
            f"[picture] {len(volumes)} volumes and {len(captions)} captions: need a volume for each caption"
        )
    rows = [picture(volume, scale) for volume in volumes]
    head = _CAPTION if captions else 0
    width = max(row.width for row in rows)
    canvas = Image.new("L", (width, sum(row.height + head + _GAP for row in rows) - _GAP))
    draw = ImageDraw.Draw(canvas)
    top = 0
    for number, row in enumerate(rows):
        draw.text((2, top), captions[number] if number < len(captions) else "", fill=255)
        canvas.paste(row, (0, top + head))
        top += head + row.height + _GAP
    return canvas


def save_picture(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG, whole or not at all (ValueError: another suffix, an unwritable folder, a full disk)."""
    with atomic_file(check_png_path(path)) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def check_png_path(path: str | os.PathLike[str]) -> Path:
    """`path`, if it ends in `.png` (ValueError otherwise)."""
    if not os.fspath(path).endswith(".png"):
        raise ValueError(f"[picture] output {os.fspath(path)!r}: need a name that ends in .png")
    return Path(path)
