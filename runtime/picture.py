"""Pictures of volumes: three orthogonal planes as radiology shows them, and mosaics of many volumes.

Axial: the patient's right on the left of the picture, the front at the top. Coronal: right on the left, head at the
top. Sagittal: front on the left, head at the top. Pixels are square: slices are scaled by their spacing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .atomic import atomic_file
from .volume import Volume

_GAP = 4
_CAPTION = 14


def planes(volume: Volume) -> list[NDArray[np.float32]]:
    """The middle axial, coronal and sagittal slices of channel 0, rows from the top; one slice if it is 2D."""
    array = volume.channels[0]
    # RAS+ after this: axis 0 to the patient's right, 1 to the front, 2 to the head.
    array = apply_orientation(array, io_orientation(volume.affine))
    i, j, k = (size // 2 for size in array.shape)
    axial = array[::-1, ::-1, k].T
    if len(volume.spacing_mm) == 2:
        return [axial]
    return [axial, array[::-1, j, ::-1].T, array[i, ::-1, ::-1].T]


def picture(volume: Volume, scale: float = 3.0) -> Image.Image:
    """The planes side by side, 8 bits grey; `scale` is in pixels per smallest voxel edge.

    The grey range is the volume's 0.5th to 99.5th percentile, the same for all planes.
    """
    if not 0 < scale <= 64:
        raise ValueError(f"[picture] scale={scale}: need more than 0, at most 64")
    low, high = np.percentile(volume.channels[0], [0.5, 99.5])
    width = max(float(high - low), 1e-12)
    x, y, z = nibabel.affines.voxel_sizes(_ras(volume))
    pixels = scale / min((x, y, z) if len(volume.spacing_mm) == 3 else (x, y))
    tiles = []
    for plane, (across, down) in zip(planes(volume), [(x, y), (x, z), (y, z)], strict=False):
        grey = (np.clip((plane - low) / width, 0, 1) * 255).round().astype(np.uint8)
        size = (
            max(1, round(plane.shape[1] * across * pixels)),
            max(1, round(plane.shape[0] * down * pixels)),
        )
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
    if not os.fspath(path).endswith(".png"):
        raise ValueError(f"[picture] output {os.fspath(path)!r}: need a name that ends in .png")
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def _ras(volume: Volume) -> NDArray[np.float64]:
    orientation = io_orientation(volume.affine)
    shape = volume.channels.shape[1:]
    return np.asarray(volume.affine @ nibabel.orientations.inv_ornt_aff(orientation, shape))
