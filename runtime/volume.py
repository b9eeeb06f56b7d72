"""Volume: a sampled image in the coordinates of its scanner, and its NIfTI file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from .atomic import atomic_file
from .nifti import load_nifti, voxel_sizes
from .report import Report


@final
@dataclass(frozen=True, eq=False)
class Volume:
    """A sampled volume.

    Attributes:
        array: float32 `[D, H, W]` or `[C, D, H, W]` (2D models: `[H, W]`, `[C, H, W]`). The spatial axes are the
            NIfTI axes i, j, k in this order, as MONAI loads them.
        affine: float64 `[4, 4]`, voxel indices to millimetres in RAS+ (x to the right, y forward, z up).
        spacing_mm: the voxel size along each spatial axis, 2 or 3 numbers.
        report: how it was made; None for a volume that was not sampled.
    """

    array: NDArray[np.float32]
    affine: NDArray[np.float64]
    spacing_mm: tuple[float, ...]
    report: Report | None = None

    def __post_init__(self) -> None:
        dims = len(self.spacing_mm)
        if self.array.dtype != np.float32 or dims not in (2, 3) or self.array.ndim not in (dims, dims + 1):
            raise ValueError(
                f"[volume] array {self.array.dtype}{list(self.array.shape)} with spacing {self.spacing_mm}: need float32 "
                "of as many axes as spacings, or one more for channels"
            )
        if self.affine.shape != (4, 4):
            raise ValueError(f"[volume] affine has shape {self.affine.shape}: need (4, 4)")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The array, where numpy wants one: a Volume may be given as a condition."""
        return np.array(self.array, dtype=dtype) if copy else np.asarray(self.array, dtype=dtype)

    @property
    def channels(self) -> NDArray[np.float32]:
        """The array as `[C, D, H, W]`, with W=1 for a 2D volume; shares memory."""
        array = self.array if self.array.ndim > len(self.spacing_mm) else self.array[None]
        return array if array.ndim == 4 else array[..., None]

    def save(self, path: str | os.PathLike[str], description: str = "volcast") -> None:
        """Write `.nii` or `.nii.gz`: float32, mm, sform and qform with code 1 (scanner), channels on axis 4.

        Raises:
            ValueError: another suffix, an unwritable folder, a full disk. No half-written file is left.
        """
        import nibabel  # a seventh of what importing volcast would take

        path = check_nifti_path(path)
        image = self._image(description)
        with atomic_file(path) as temporary:
            nibabel.save(image, temporary)

    def nifti(self, description: str = "volcast") -> bytes:
        """What `save` writes to a `.nii` file."""
        content: bytes = self._image(description).to_bytes()
        return content

    def _image(self, description: str) -> Any:
        import nibabel

        data = self.channels[0] if self.channels.shape[0] == 1 else np.moveaxis(self.channels, 0, -1)
        image = nibabel.Nifti1Image(data, self.affine, dtype=np.float32)
        image.header.set_xyzt_units("mm", "sec")
        image.set_sform(self.affine, code=1)
        image.set_qform(self.affine, code=1)
        image.header["descrip"] = description.encode("ascii", "replace")[:79]
        return image


def read_nifti(path: str | os.PathLike[str]) -> Volume:
    """The volume in a NIfTI file, `[i, j, k]` (a file of two axes: one slice), scaled as its header says, with its affine.

    Raises:
        ValueError: see `load_nifti`.
    """
    header, array = load_nifti(f"[volume] {os.fspath(path)}", path)
    affine = np.asarray(header.get_best_affine(), np.float64)
    spacing = (*voxel_sizes(header)[: array.ndim], 1.0)[:3]
    return Volume(np.atleast_3d(array), affine, spacing)


def check_nifti_path(path: str | os.PathLike[str]) -> Path:
    """`path`, if it ends in `.nii` or `.nii.gz` (ValueError otherwise)."""
    name = Path(path).name
    if not name.endswith((".nii", ".nii.gz")) or name.startswith(".nii"):
        raise ValueError(f"[volume] output {os.fspath(path)!r}: need a name that ends in .nii or .nii.gz")
    return Path(path)


def refined_affine(affine: NDArray[np.float64], factors: Sequence[int]) -> NDArray[np.float64]:
    """The affine of a grid with so many times as many voxels along each axis over the same field of view."""
    shrink = 1 / np.array([*factors, 1][:3])
    finer = affine.copy()
    finer[:3, :3] = affine[:3, :3] * shrink
    finer[:3, 3] += affine[:3, :3] @ (
        (shrink - 1) / 2
    )  # the first voxel's centre, half a coarse one from its edge
    return finer


def centred_affine(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> NDArray[np.float64]:
    """The RAS+ affine of a volume of this spatial `shape` whose centre is the origin; a 2D volume is 1 mm thick."""
    spacing = np.array([*spacing_mm, 1.0][:3])
    size = np.array([*shape, 1][:3])
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (size - 1) / 2
    return affine
