"""Label maps and hints as NIfTI files, checked to lie on the model's grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .frame import check_grid
from .nifti import load_nifti, voxel_sizes
from .spec import Manifest
from .volume import Volume


def read_on_grid(
    path: str | os.PathLike[str], spec: Manifest | None, coarser: Sequence[int] = (1, 1, 1)
) -> Volume:
    """The label map or image in a NIfTI file, `[i, j, k]` (a 2D model's: `[i, j]`), with its affine.

    Its axes must run as those of the volumes that are sampled (to the right, forward, up), with the model's voxel size;
    `coarser` times as large for an upscaler's low-resolution image; without a spec (a server has it) it goes unchecked.

    Raises:
        ValueError: see `load_nifti`; other axes or voxels, a 2D model and more than one slice.
    """
    where = f"[mask] {os.fspath(path)}"
    return on_grid(where, *load_nifti(where, path), spec, coarser)


def on_grid(
    where: str,
    header: Any,
    array: NDArray[np.float32],
    spec: Manifest | None,
    coarser: Sequence[int] = (1, 1, 1),
) -> Volume:
    """`read_on_grid` of what was read: nibabel's `header` of a NIfTI file, and its numbers. Errors begin with `where`."""
    affine = header.get_best_affine()
    dims = array.ndim if spec is None else len(spec.spacing_mm)
    if array.ndim < dims or (dims == 2 and array.shape[2:] not in ((), (1,))):
        raise ValueError(
            f"{where} has shape {array.shape}: need {'three axes' if dims == 3 else 'one slice'}"
        )
    spacing = voxel_sizes(header)[:dims]
    check_grid(where, affine, spacing, spec, coarser)
    return Volume(
        np.ascontiguousarray(array[..., 0] if dims < array.ndim else array),
        np.asarray(affine, np.float64),
        spacing,
    )
