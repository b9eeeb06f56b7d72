"""The images of a folder, to be compared with those of another: NIfTI volumes, PNG slices, or a generated dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from volcast.runtime.dataset_manifest import DESCRIPTION, read_manifest
from volcast.runtime.nifti import load_nifti

Array = NDArray[np.float32]

FEWEST = 4
"""Images a side: half of them, which an interval takes, must still be a set."""
NIFTI, PNG = (".nii", ".nii.gz"), ".png"
_GREY = ("L", "I;16", "I", "F")


@final
@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images of one shape.

    Attributes:
        folder: where they lie.
        names: one an image, its path below the folder without suffix.
        images: float32 `[N, C, D, H, W]` or `[N, C, H, W]`, finite; of NIfTI files in RAS+, nearest to their affine.
        spacing_mm: along each spatial axis; empty for PNG.
    """

    folder: Path
    names: tuple[str, ...]
    images: Array
    spacing_mm: tuple[float, ...]


def read_images(folder: Path) -> ImageSet:
    """The `.nii`, `.nii.gz` or `.png` files of a folder, or of a dataset that `volcast generate` wrote, in their order.

    Raises:
        ValueError: too few of them, both NIfTI and PNG, one that is unreadable, has no affine, another shape or voxel
            size than the first, or numbers that are not finite.
    """
    paths = _paths(folder)
    if len(paths) < FEWEST:
        raise ValueError(
            f"[evaluate] {folder} holds {len(paths)} images (.nii, .nii.gz, .png): need {FEWEST} or more"
        )
    pictures = [path for path in paths if path.suffix == PNG]
    if pictures and len(pictures) < len(paths):
        raise ValueError(
            f"[evaluate] {folder} holds both NIfTI and PNG ({pictures[0].name}): keep one kind in a folder"
        )
    first, spacing = _read(paths[0])
    images = np.empty((len(paths), *first.shape), np.float32)
    for place, path in enumerate(paths):
        image, own = _read(path)
        check_alike("evaluate", path, image.shape[1:], own, paths[0], first.shape[1:], spacing)
        if image.shape != first.shape:
            raise ValueError(
                f"[evaluate] {path} has {len(image)} channels, {paths[0].name} {len(first)}; leave one out"
            )
        if not np.isfinite(image).all():
            raise ValueError(f"[evaluate] {path} holds values that are not finite; leave it out or repair it")
        images[place] = image
    names = tuple(path.relative_to(folder).as_posix().split(".")[0] for path in paths)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"[evaluate] {folder} holds {twice} twice, with two suffixes; leave one out")
    return ImageSet(folder=folder, names=names, images=images, spacing_mm=spacing)


def check_alike(
    operation: str, one: Path | str, shape: Sequence[int], spacing: Sequence[float],
    other: Path | str, wanted: Sequence[int], wanted_spacing: Sequence[float],
) -> None:  # fmt: skip
    """ValueError: two images whose voxels cannot be compared; `spacing` is empty where there is none to compare."""
    if tuple(shape) != tuple(wanted):
        raise ValueError(
            f"[{operation}] {one} has the shape {_times(shape)}, {other} {_times(wanted)}: need one shape; "
            "crop or resample them first"
        )
    # A header's float32, written by another program: far less than any resampling.
    if spacing and wanted_spacing and not np.allclose(spacing, wanted_spacing, rtol=1e-3, atol=0):
        raise ValueError(
            f"[{operation}] {one} has voxels of {_times(spacing)} mm, {other} of {_times(wanted_spacing)}: need one "
            "size; resample them first"
        )


def _paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"[evaluate] {folder} is no folder; give a folder of images")
    if (folder / DESCRIPTION).is_file():
        # A killed run may leave volumes that its manifest does not hold.
        return sorted(folder / entry.file for entry, _ in read_manifest(folder))
    return sorted(
        path for path in folder.iterdir()
        if path.name.endswith((*NIFTI, PNG)) and not path.name.startswith(".")
    )  # fmt: skip


def _read(path: Path) -> tuple[Array, tuple[float, ...]]:
    """`[C, ...]` and the voxel sizes of the axes behind."""
    if path.suffix == PNG:
        return _read_png(path), ()
    header, array = load_nifti(f"[evaluate] {path}", path, most_axes=4)
    affine = np.asarray(header.get_best_affine(), np.float64)
    array = array.reshape(*array.shape, *(1,) * (3 - array.ndim))
    turned: Any = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
    data = np.asarray(turned.dataobj, np.float32)
    data = np.moveaxis(data, -1, 0) if data.ndim == 4 else data[None]
    spacing = nibabel.affines.voxel_sizes(turned.affine)
    # A slice is a volume of one voxel along one axis.
    kept = [axis for axis in range(3) if data.shape[1 + axis] > 1]
    if len(kept) < 2:
        raise ValueError(f"[evaluate] {path} has shape {array.shape}: need 2 axes of more than one voxel")
    data = data.reshape(len(data), *(data.shape[1 + axis] for axis in kept))
    return np.ascontiguousarray(data), tuple(float(spacing[axis]) for axis in kept)


def _read_png(path: Path) -> Array:
    try:
        with Image.open(path) as picture:
            mode, array = picture.mode, np.asarray(picture, np.float32)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"[evaluate] {path}: cannot read it as PNG ({' '.join(str(error).split())})"
        ) from error
    if mode not in _GREY:
        raise ValueError(f"[evaluate] {path} is a picture of mode {mode}: need grey ones")
    return array[None]


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
