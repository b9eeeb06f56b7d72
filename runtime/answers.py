"""Volumes as they cross to a client: raw float32, float16 or uint16 with a scale, or a NIfTI file."""

from __future__ import annotations

import gzip
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .interface import Array, Format, as_bytes
from .region import Region
from .volume import Volume


def pack_volume(volume: Volume, form: Format) -> dict[str, Array]:
    """The output tensors that hold `volume`. uint16 loses at most half a step of 1/65535 of its range."""
    found: dict[str, Array] = {"affine": volume.affine}
    if form == "nifti":
        found[_name(form)] = as_bytes(gzip.compress(volume.nifti(), 1, mtime=0))  # equal volumes, equal bytes
    elif form == "uint16":
        found[_name(form)], found["scale"] = _quantised(volume.array)
    else:
        with np.errstate(over="ignore"):
            array = volume.array.astype(form)
        if not np.isfinite(array).all():
            raise ValueError(
                f"[answer] values up to {np.abs(volume.array).max():g} do not fit {form}; ask for float32"
            )
        found[_name(form)] = array
    return found


def place_volume(tensors: Mapping[str, Array], form: Format, region: Region) -> dict[str, Array]:
    """`pack_volume`'s tensors with the volume itself written into `region`."""
    name = _name(form)
    array = tensors[name]
    return {
        **{key: value for key, value in tensors.items() if key != name},
        "region_offset": np.array([region.write(array)], np.int64),
        "region_shape": np.array(array.shape, np.int64),
    }


def fetch_volume(tensors: Mapping[str, Array], form: Format, region: Region) -> dict[str, Array]:
    """The inverse of `place_volume`. ValueError: the tensors do not tell where in `region` a volume is."""
    if not {"region_offset", "region_shape"} <= tensors.keys():
        raise ValueError(f"[answer] holds {', '.join(tensors)}: no place in a region")
    shape = tuple(int(size) for size in tensors["region_shape"])
    dtype = "uint8" if form == "nifti" else form
    return {**tensors, _name(form): region.take(int(tensors["region_offset"][0]), shape, dtype)}


def unpack_volume(tensors: Mapping[str, Array], spacing_mm: tuple[float, ...] | None = None) -> Volume:
    """The volume that an answer's tensors hold; `spacing_mm`: None to read it off the affine."""
    affine = np.asarray(tensors["affine"], np.float64).reshape(4, 4)
    if "volume_uint16" in tensors:
        scale, offset = (float(one) for one in tensors["scale"])
        array = np.asarray(tensors["volume_uint16"], np.float32) * np.float32(scale) + np.float32(offset)
    else:
        name = next((name for name in ("volume_float32", "volume_float16") if name in tensors), None)
        if name is None:
            raise ValueError(
                f"[answer] holds {', '.join(tensors)}: no volume; ask for float32, float16 or uint16"
            )
        array = np.asarray(tensors[name], np.float32)
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(0))
    spacing = spacing_mm or tuple(float(one) for one in lengths[: array.ndim])
    return Volume(np.ascontiguousarray(array), affine, spacing)


def _name(form: Format) -> str:
    return form if form == "nifti" else f"volume_{form}"


def _quantised(array: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    low, high = float(array.min()), float(array.max())
    scale = (high - low) / 65535 or 1.0
    numbers = np.rint((array.astype(np.float64) - low) / scale).astype(np.uint16)
    return numbers, np.array([scale, low], np.float32)
