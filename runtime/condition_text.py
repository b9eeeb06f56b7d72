"""Conditions as a person types them: `anterior=0.5`, `context=0.5,0.2,0.4`, `hint=@hint.npy`, `mask=@mask.nii.gz`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .low_res import enlargement
from .mask import read_on_grid
from .request import MOST_WEIGHTS
from .spec import LOW_RES, ArtifactSpec, Manifest
from .volume import Volume


def parse_conditions(
    spec: Manifest | None, texts: Iterable[str]
) -> dict[str, float | NDArray[np.generic] | Volume]:
    """The mapping that `Model.sample(condition=...)` takes.

    One number is a field's value; numbers with commas fill a whole condition in row order; `@path` reads a `.npy`
    file (never a pickle) or a NIfTI file on the model's grid (`read_on_grid`). Without a spec (a server has it) numbers with commas stay in one row.

    Raises:
        ValueError: no "=", a name given twice, a text that is not a number, an unreadable file.
    """
    values: dict[str, float | NDArray[np.generic] | Volume] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name or not value:
            raise ValueError(
                f"[condition] {text!r}: write name=number, name=number,number,... or name=@FILE (.npy, .nii.gz)"
            )
        if name in values:
            raise ValueError(f"[condition] {name} is given twice; give it once")
        if value.startswith("@") and value.endswith((".nii", ".nii.gz")):
            values[name] = _read_nifti(spec, name, value[1:])
        else:
            values[name] = _read(name, value[1:]) if value.startswith("@") else _numbers(spec, name, value)
    return values


def files_of(texts: Iterable[str], masks: Iterable[str] = (), then: Iterable[str] = ()) -> list[Path]:
    """The files that conditions, `FILE` or `NAME=FILE` of label maps, and stages of a chain are read from."""
    pairs = [*texts, *(pair for stage in then for pair in stage.split(",")[1:])]
    values = [text.partition("=")[2].strip() for text in pairs]
    named = [Path(value[1:]) for value in values if value.startswith("@")]
    # Which of the two a mask is, the artifact tells that is not open yet.
    return named + [Path(one) for mask in masks for one in (mask, mask.partition("=")[2]) if one]


def mask_texts(spec: Manifest, paths: Iterable[str]) -> list[str]:
    """`FILE` or `NAME=FILE` of label maps as conditions; without a name the model's only one.

    Raises ValueError: the model takes none, or several and this one has no name.
    """
    names = [condition.name for condition in spec.conditions if condition.is_mask]
    texts = []
    for path in paths:
        name, equals, file = path.partition("=")
        if not equals or name not in names:
            name, file = names[0] if names else "", path
            if len(names) != 1:
                raise ValueError(
                    f"[mask] {path}: {spec.name} takes several label maps: write {' or '.join(f'{n}=FILE' for n in names)}"
                    if names else
                    f"[mask] {path}: {spec.name} takes no label map; export it with --controlnet, or a SPADE network"
                )  # fmt: skip
        texts.append(f"{name}=@{file}")
    return texts


def parse_weights(text: str | None) -> float | list[float] | None:
    """`2.5` as a number; `1..10` (whole numbers, both included) or `1,2.5,7` as several; None stays None.

    Raises ValueError for anything else, weights that repeat, more than 1000 of them.
    """
    if text is None:
        return None
    first, dots, last = text.partition("..")
    try:
        many = range(int(first), int(last) + 1) if dots else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"[sample] guidance={text}: need a number (2.5), numbers with commas between (1,2.5,7), or two whole ones (1..10)"
        ) from error
    if not 1 <= len(many[: MOST_WEIGHTS + 1]) <= MOST_WEIGHTS:
        raise ValueError(
            f"[sample] guidance={text}: need 1..{MOST_WEIGHTS} weights, the smaller number first"
        )
    if len(set(many)) < len(many):
        raise ValueError(f"[sample] guidance={text}: a weight stands there twice; give each once")
    weights = [float(weight) for weight in many]
    return weights if dots or "," in text else weights[0]


def _numbers(spec: Manifest | None, name: str, text: str) -> float | NDArray[np.generic]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"[condition] {name}={text}: not a number, nor numbers with commas between"
        ) from error
    conditions = () if spec is None else spec.conditions
    shape = next((condition.shape for condition in conditions if condition.name == name), None)
    if shape is None and len(numbers) == 1:
        return numbers[0]
    array = np.array(numbers)
    fixed = [size for size in shape or () if isinstance(size, int)]
    if shape is not None and len(fixed) == len(shape) and math.prod(fixed) == len(numbers):
        return array.reshape(fixed)
    return array


def _read_nifti(spec: Manifest | None, name: str, path: str) -> Volume:
    if isinstance(spec, ArtifactSpec) and spec.low_res is not None and name == LOW_RES:
        volume = read_on_grid(path, spec, enlargement(spec))
    else:
        volume = read_on_grid(path, spec)
    shape = next((one.shape for one in (() if spec is None else spec.conditions) if one.name == name), ())
    if len(shape) == volume.array.ndim + 1 and shape[0] == 1:
        return Volume(volume.array[None], volume.affine, volume.spacing_mm)
    return volume


def _read(name: str, path: str) -> NDArray[np.generic]:
    try:
        with open(path, "rb") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"[condition] {name}=@{path}: cannot read it ({reason}); write it with numpy.save"
        ) from error
