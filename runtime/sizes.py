"""Sizes of a request: which values an axis allows, and the latent's spatial sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .spec import ArtifactSpec, Axis, Manifest


def whole(value: Any) -> Any:
    """NumPy's integers as Python's, as a loop over an array yields them; anything else as it is, for the check."""
    return int(value) if isinstance(value, np.integer) else value


def parse_sizes(operation: str, text: str | None) -> tuple[int, ...] | None:
    """`8,12,8` as numbers; None stays None. ValueError for anything else."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"[{operation}] size={text}: need whole numbers with commas between, as 8,12,8"
        ) from error


UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(operation: str, value: int | str) -> int:
    """A number of bytes, or a text such as `2GiB` or `500 MB`. ValueError for anything else, and for none at all."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    unit = found[2].upper() if found else ""
    if isinstance(value, bool) or not found or unit not in UNITS or float(found[1]) * UNITS[unit] < 1:
        raise ValueError(
            f"[{operation}] memory_limit={value!r}: need a number of bytes, or a text as 2GiB or 500MB"
        )
    return int(float(found[1]) * UNITS[unit])


def nearest(axis: Axis, size: int) -> list[int]:
    """The one or two sizes that `axis` allows next to `size`, ascending; empty when it allows none."""
    first = -(-axis.minimum // axis.multiple) * axis.multiple
    last = axis.maximum // axis.multiple * axis.multiple
    if first > last:
        return []
    below = min(max(size // axis.multiple * axis.multiple, first), last)
    above = min(max(-(-size // axis.multiple) * axis.multiple, first), last)
    return sorted({below, above})


def check_size(operation: str, axis: Axis, size: int) -> None:
    """Raise ValueError, naming the nearest sizes, unless `axis` allows `size`."""
    if axis.minimum <= size <= axis.maximum and size % axis.multiple == 0:
        return
    multiple = f" and a multiple of {axis.multiple}" if axis.multiple > 1 else ""
    choice = " or ".join(str(value) for value in nearest(axis, size)) or "none; export with other axes"
    raise ValueError(
        f"[{operation}] {axis.name}={size}: need {axis.minimum}..{axis.maximum}{multiple}; nearest: {choice}"
    )


def latent_sizes(
    spec: ArtifactSpec, size: Sequence[int] | None = None, operation: str = "sample"
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The latent's spatial sizes, and the size of each axis among them and of those that follow (`related_sizes`).

    `size` is in latent voxels, one number a spatial axis; None: the artifact's own. `operation` goes into errors.

    Raises:
        ValueError: too few or many numbers, a size that its axis does not allow, two sizes for one axis.
    """
    default = spec.latent_shape[1:]
    if size is None:
        wanted = default
    else:
        wanted = tuple(whole(one) for one in size)
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in wanted):
            raise ValueError(f"[{operation}] size={wanted}: need {len(default)} whole numbers, as {default}")
    if len(wanted) != len(default):
        raise ValueError(f"[{operation}] size={wanted}: need {len(default)} numbers, as {default}")
    x = next((tensor for tensor in spec.programs["step"].inputs if tensor.name == "x"), None)
    if x is None or len(x.shape) != len(default) + 2:
        raise ValueError(
            "[artifact] program step has no input x of the latent's rank; export the model again"
        )
    sizes: dict[str, int] = {}
    for name, value in zip(x.shape[2:], wanted, strict=True):
        if isinstance(name, str):
            check_size(operation, spec.axis(name), value)
            if sizes.setdefault(name, value) != value:
                raise ValueError(
                    f"[{operation}] size={wanted}: the model needs equal sizes along axis {name}"
                )
        elif name != value:
            raise ValueError(f"[{operation}] size={wanted}: this model was exported for {default} only")
    return wanted, sizes | related_sizes(spec, sizes)


def volume_shape(
    spec: Manifest, size: Sequence[int] | None = None, operation: str = "sample"
) -> tuple[int, ...]:
    """The spatial shape of the volume that comes of a latent of these spatial sizes; arguments as in `latent_sizes`.

    Token and one-pass models have one size, and no `size`.
    """
    if isinstance(spec, ArtifactSpec):
        spatial, sizes = latent_sizes(spec, size, operation)
    else:
        spatial, sizes = (), default_sizes(spec)
    if "decode" not in spec.programs:
        return spatial
    shape = spec.programs["decode"].outputs[0].shape[2:]
    return tuple(one if isinstance(one, int) else sizes[one] for one in shape)


def default_sizes(spec: Manifest) -> dict[str, int]:
    """The sizes that `latent_sizes` gives at the artifact's own; of a model whose volumes have one size, every axis' own."""
    if isinstance(spec, ArtifactSpec):
        return latent_sizes(spec)[1]
    return {axis.name: axis.maximum for axis in spec.axes if axis.name != "batch"}


def volume_channels(spec: Manifest) -> int:
    """The channels of a volume, of any kind of model."""
    size: int | str = 1
    if "decode" in spec.programs:
        size = spec.programs["decode"].outputs[0].shape[1]
    elif isinstance(spec, ArtifactSpec):
        size = spec.latent_shape[0]
    return size if isinstance(size, int) else 1


def related_sizes(spec: Manifest, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes that follow from the latent's: an image's (`o0` of `d0`) and those of a network's levels (`d0_2`).

    Axes of one number are multiples of the same blocks, so their `multiple` says how they relate.
    """
    axes = {axis.name: axis.multiple for axis in spec.axes}
    related = {}
    for name, multiple in axes.items():
        found = re.fullmatch(r"(?:o(\d)|d(\d)_\d+)", name)
        latent = f"d{found[1] or found[2]}" if found else ""
        if latent in sizes and latent in axes:
            related[name] = sizes[latent] * multiple // axes[latent]
    return related


def smallest_batch(spec: ArtifactSpec) -> int:
    """How few samples a call of the network may hold: 1, but for a model exported with a larger smallest batch."""
    size = next(tensor.shape[0] for tensor in spec.programs["step"].inputs if tensor.name == "x")
    return size if isinstance(size, int) else spec.axis(size).minimum
