"""The order in which a transformer reads a grid of tokens, from a config's `ordering`, as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils.ordering import Ordering

from volcast.export.bundle_config import Config, one_line, shown
from volcast.export.bundle_expression import Component

_TARGET = re.compile(r"(?:(?:monai|generative)\.utils\.(?:ordering\.)?)?Ordering")
_ARGUMENTS = {
    "ordering_type",
    "spatial_dims",
    "dimensions",
    "reflected_spatial_dims",
    "transpositions_axes",
    "rot90_axes",
    "transformation_order",
}
_REMEDY = (
    "correct it with --set ordering=..., or give the table itself with --set order=[...] or order=FILE.npy"
)


def read_order(config: Config, root: Path, token_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The place in the grid (counted in C order) of each token of the sequence; () for a raster scan.

    `order` of the config is the table itself, a list or a `.npy` file in the bundle. Else `ordering` is MONAI's
    `Ordering`: its type alone, its arguments, or a component with `_target_`. Raises ValueError: it does not fit the
    token shape, or it is random and no table says how it was drawn when the model was trained.
    """
    length = int(np.prod(token_shape))
    if "order" in config:
        table = _table(config.need("order"), root)
        if sorted(table) != list(range(length)):
            raise ValueError(
                f"[bundle] order: {len(table)} places do not fit token_shape={list(token_shape)}: need each of "
                f"0..{length - 1} once; give that of training with --set order=[...]"
            )
    else:
        table = _ordering(_arguments(config), token_shape)
    return () if table == list(range(length)) else tuple(table)


def _table(value: Any, root: Path) -> list[int]:
    if isinstance(value, str) and value.endswith(".npy"):
        path = (root / value).resolve()
        if not path.is_relative_to(root.resolve()):
            raise ValueError(
                f"[bundle] order={shown(value)} lies outside the bundle {root}; copy the file in"
            )
        try:
            with path.open("rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"[bundle] order={shown(value)}: cannot read it ({one_line(error)}); write it with numpy.save"
            ) from None
        value = array.tolist() if array.dtype.kind in "iu" else None
    if not isinstance(value, list | tuple) or not all(type(place) is int for place in value):
        raise ValueError(
            f"[bundle] order={shown(value)}: need a list of whole numbers or a .npy file of them"
        )
    return list(value)


def _arguments(config: Config) -> Mapping[str, Any]:
    if "ordering" not in config:
        return {"ordering_type": "raster_scan"}
    value = config.need("ordering", _REMEDY)
    if isinstance(value, Component):
        target = str(config.raw(value.id).get("_target_"))
        if not _TARGET.fullmatch(target):
            raise ValueError(
                f"[bundle] ordering: _target_={shown(target)} is not MONAI's Ordering; {_REMEDY}"
            )
        return config.arguments(value.id)
    if isinstance(value, str):
        return {"ordering_type": value}
    if isinstance(value, dict):
        return value
    raise ValueError(f"[bundle] ordering={shown(value)}: need raster_scan, s_curve or arguments; {_REMEDY}")


def _ordering(arguments: Mapping[str, Any], token_shape: tuple[int, ...]) -> list[int]:
    unknown = sorted(map(str, arguments.keys() - _ARGUMENTS))
    if unknown:
        raise ValueError(f"[bundle] ordering has no argument {', '.join(unknown)}; {_REMEDY}")
    given = dict(arguments)
    kind = given.pop("ordering_type", None)
    if kind == "random":
        raise ValueError(
            "[bundle] ordering_type='random' draws another order each time: give the one of training "
            "(Ordering.get_sequence_ordering()) with --set order=[...] or order=FILE.npy"
        )
    dims = given.pop("spatial_dims", len(token_shape))
    dimensions = given.pop("dimensions", [1, *token_shape])
    if dims != len(token_shape) or list(dimensions)[1:] != list(token_shape):
        raise ValueError(
            f"[bundle] ordering: spatial_dims={shown(dims)}, dimensions={shown(dimensions)} do not fit "
            f"token_shape={list(token_shape)}; {_REMEDY}"
        )
    try:
        made: Any = Ordering
        found = made(kind, dims, (1, *token_shape), **given).get_sequence_ordering()
    # Ordering checks little: numpy or Python fails where an argument is used.
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"[bundle] ordering={shown(arguments)}: {one_line(error)}; {_REMEDY}") from None
    return [int(place) for place in found]
