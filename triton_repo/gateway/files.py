"""The volumes in a request: an image, and conditions in files."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, final

import numpy as np

from volcast.runtime.frame import fitted
from volcast.runtime.low_res import enlargement
from volcast.runtime.mask import on_grid
from volcast.runtime.nifti import voxel_sizes
from volcast.runtime.spec import LOW_RES, ArtifactSpec, Manifest
from volcast.runtime.volume import Volume

from .nifti import read_upload
from .shapes import takes_file


@final
class Files:
    """Reads them for one artifact. Safe to use from any thread."""

    def __init__(self, spec: Manifest, most_voxels: int) -> None:
        self._spec, self._most_voxels = spec, most_voxels
        self._dims = len(spec.spacing_mm)

    def image(self, text: str | None) -> Volume | None:
        """The image in a base64 text, as `read_nifti` reads the file. ValueError: see `read_upload`, other axes."""
        return None if text is None else self._on_own_grid("image", text)

    def mask(self, text: str) -> Volume:
        """The mask of what to paint anew, likewise."""
        return self._on_own_grid("inpaint mask", text)

    def _on_own_grid(self, name: str, text: str) -> Volume:
        header, array = read_upload(name, text, self._most_voxels)
        slices = array.shape[2:] if self._dims == 2 else ()
        if array.ndim - len(slices) != self._dims or slices not in ((), (1,)):
            raise ValueError(f"[request] {name} has shape {array.shape}: need {self._dims} axes")
        spacing = voxel_sizes(header)[: array.ndim]
        volume = Volume(
            np.ascontiguousarray(array), np.asarray(header.get_best_affine(), np.float64), spacing
        )
        found: Volume = fitted(f"[request] {name}", volume, self._spec)
        return found

    def conditions(self, part: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given`, the body's `part`, with the files among its values read, each on the model's grid (`runtime.mask`)."""
        return {
            name: self._condition(part, name, value) if isinstance(value, str) else value
            for name, value in given.items()
        }

    def _condition(self, part: str, name: str, text: str) -> Volume:
        spec = next((one for one in self._spec.conditions if one.name == name), None)
        if spec is None or not takes_file(self._spec, spec):
            known = ", ".join(one.name for one in self._spec.conditions if takes_file(self._spec, one))
            raise ValueError(
                f"[request] {part} {reprlib.repr(name)} takes no file; those that do: {known or 'none'}"
            )
        where = name if part == "condition" else f"{part} {name}"
        header, array = read_upload(where, text, self._most_voxels)
        if self._dims == 3 and array.ndim == 2:
            raise ValueError(f"[request] {where} has shape {array.shape}: need 3 axes")
        coarser: tuple[int, ...] = (1, 1, 1)
        if isinstance(self._spec, ArtifactSpec) and self._spec.low_res is not None and name == LOW_RES:
            coarser = enlargement(self._spec)
        volume = on_grid(f"[request] {where}", header, array, self._spec, coarser)
        if len(spec.shape) == volume.array.ndim + 1:
            return Volume(volume.array[None], volume.affine, volume.spacing_mm)
        return volume
