"""Conditions as a person types them: `anterior=0.5`, `context=0.5,0.2,0.4`, `mask=@mask.npy`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from .spec import ArtifactSpec


def parse_conditions(
    spec: ArtifactSpec | None, texts: Iterable[str]
) -> dict[str, float | NDArray[np.generic]]:
    """The mapping that `Model.sample(condition=...)` takes.

    One number is a field's value; numbers with commas fill a whole condition in row order; `@path` reads a `.npy`
    file (never a pickle). Without a spec (a server has it) numbers with commas stay in one row.

    Raises:
        ValueError: no "=", a name given twice, a text that is not a number, an unreadable file.
    """
    values: dict[str, float | NDArray[np.generic]] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name or not value:
            raise ValueError(
                f"[condition] {text!r}: write name=number, name=number,number,... or name=@file.npy"
            )
        if name in values:
            raise ValueError(f"[condition] {name} is given twice; give it once")
        values[name] = _read(name, value[1:]) if value.startswith("@") else _numbers(spec, name, value)
    return values


def _numbers(spec: ArtifactSpec | None, name: str, text: str) -> float | NDArray[np.generic]:
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


def _read(name: str, path: str) -> NDArray[np.generic]:
    try:
        with open(path, "rb") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"[condition] {name}=@{path}: cannot read it ({reason}); write it with numpy.save"
        ) from error
