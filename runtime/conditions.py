"""Conditions of a request: named numbers and arrays, checked against the artifact's ConditionSpecs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sizes import check_size
from .spec import ArtifactSpec, ConditionField, ConditionSpec, Manifest, Ratio

Array = NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The values of one sample, without a batch axis, and the sizes of the axes that they fix."""

    values: Mapping[str, Array]
    sizes: Mapping[str, int]


def resolve(spec: Manifest, given: Mapping[str, Any] | None, sizes: Mapping[str, int]) -> Conditions:
    """The conditions of one sample.

    Args:
        spec: the artifact.
        given: a condition's name with a whole array, or a field's name with a number; absent fields take their
            default. An array's size 1 along a named axis is repeated to the size of that axis.
        sizes: the axes whose size is known (`latent_sizes`).

    Raises:
        ValueError: an unknown name, a missing array, a wrong shape or type, NaN, a number out of range.
    """
    rest = dict(given or {})
    _refuse_unknown(spec.conditions, rest)
    known = dict(sizes)
    values = {}
    for condition in spec.conditions:
        fields = {field.name: rest[field.name] for field in condition.fields if field.name in rest}
        if condition.name in rest:
            if fields:
                raise ValueError(
                    f"[condition] {condition.name} and its field {next(iter(fields))} are both given; give one of them"
                )
            values[condition.name] = _whole(spec, condition, rest[condition.name], known)
        elif condition.fields:
            numbers = list(_numbers(condition, fields).values())
            for field, number in zip(condition.fields, numbers, strict=True):
                if condition.dtype == "int64" and number != round(number):
                    raise ValueError(f"[condition] {field.name}={number:g}: need a whole number")
            shown = [number * field.factor for field, number in zip(condition.fields, numbers, strict=True)]
            values[condition.name] = np.array(shown, condition.dtype).reshape(condition.shape)  # type: ignore[arg-type]
        else:
            what = "label map" if condition.is_mask else "array"
            raise ValueError(
                f"[condition] {condition.name} is missing: give a {condition.dtype} {what} of shape {_shape(condition)}"
            )
    return Conditions(values=values, sizes=known)


def unconditional(
    spec: ArtifactSpec, conditions: Conditions, negative: Mapping[str, Any] | None = None
) -> dict[str, Array]:
    """The values of the other branch of classifier-free guidance.

    They are those of `negative`, which takes what `resolve` takes (a negative prompt), where it names a condition or a field
    of it, whose other fields then take their defaults; else its `unconditional` value; a condition without one (a label
    map, say) keeps its own.

    Raises:
        ValueError: `negative` does not fit; without it no condition has an unconditional value.
    """
    if not negative and all(condition.unconditional is None for condition in spec.conditions):
        raise ValueError(
            f"[sample] guidance: {spec.name} names no unconditional value; give negative={{...}}, or leave guidance out"
        )
    other = _values(spec, negative or {}, conditions.sizes)
    values = dict(conditions.values)
    for condition in spec.conditions:
        if condition.name in other:
            values[condition.name] = other[condition.name]
        elif condition.unconditional is not None:
            values[condition.name] = np.full_like(values[condition.name], condition.unconditional)
    return values


def named(spec: Manifest, given: Iterable[str]) -> tuple[ConditionSpec, ...]:
    """Those conditions that are among the names `given`, or fields of which are."""
    names = set(given)
    return tuple(one for one in spec.conditions if names & {one.name, *(field.name for field in one.fields)})


def _values(spec: ArtifactSpec, given: Mapping[str, Any], sizes: Mapping[str, int]) -> Mapping[str, Array]:
    """The values of those conditions that `given` names, or fields of which it names."""
    try:
        _refuse_unknown(spec.conditions, given)
        return resolve(spec.model_copy(update={"conditions": named(spec, given)}), given, sizes).values
    except ValueError as error:
        raise ValueError(str(error).replace("[condition]", "[negative]", 1)) from None


def _refuse_unknown(conditions: Iterable[ConditionSpec], given: Mapping[str, Any]) -> None:
    names = [name for c in conditions for name in (c.name, *(field.name for field in c.fields))]
    for name in given:
        if names.count(name) > 1:
            raise ValueError(f"[condition] {name!r} names several things; give whole arrays instead")
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            guess = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"[condition] unknown name {name!r}: {guess}known: {', '.join(names) or 'none'}")


def _numbers(condition: ConditionSpec, given: Mapping[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for field in condition.fields:
        if field.name in given:
            values[field.name] = _in_range(field, given[field.name])
        elif not isinstance(field.default, Ratio):
            values[field.name] = field.default
    for field in condition.fields:
        if field.name not in values and isinstance(field.default, Ratio):
            values[field.name] = _in_range(field, _ratio(field.name, field.default, values))
    return {field.name: values[field.name] for field in condition.fields}


def _in_range(field: ConditionField, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not field.minimum <= number <= field.maximum:
        raise ValueError(f"[condition] {field.name}={value}: need {field.minimum:g}..{field.maximum:g}")
    return number


def _ratio(name: str, ratio: Ratio, values: Mapping[str, float]) -> float:
    def total(terms: Mapping[str, float]) -> float:
        missing = terms.keys() - values.keys() - {""}
        if missing:
            raise ValueError(
                f"[artifact] the default of {name} needs {sorted(missing)}, which have no value; give {name}"
            )
        return sum(weight * values.get(term, 1.0) for term, weight in terms.items())

    below = total(ratio.denominator)
    if below == 0:
        raise ValueError(f"[condition] the default of {name} divides by zero for these values; give {name}")
    return total(ratio.numerator) / below


def _whole(spec: Manifest, condition: ConditionSpec, value: Any, known: dict[str, int]) -> Array:
    where = f"[condition] {condition.name}"
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: not an array of numbers; give shape {_shape(condition)}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where}: dtype {array.dtype} is not a number; give {condition.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(condition.dtype)
    if not (np.isfinite(array).all() and np.isfinite(cast).all()):
        raise ValueError(
            f"{where} holds NaN, infinity or a number beyond {condition.dtype}; give finite numbers"
        )
    if condition.dtype == "int64" and (cast != array).any():
        raise ValueError(f"{where} holds fractions or numbers beyond int64; give whole numbers")
    if array.ndim != len(condition.shape):
        raise ValueError(f"{where} has shape {array.shape}: need {_shape(condition)}, without a batch axis")
    target = []
    for size, wanted in zip(array.shape, condition.shape, strict=True):
        if isinstance(wanted, str):
            if wanted not in known:
                check_size(f"condition {condition.name}", spec.axis(wanted), size)
                known[wanted] = size
            # A label map of one slice is a mistake, not a map to repeat.
            if size != known[wanted] and (size != 1 or condition.is_mask):
                fit = tuple(known.get(str(one), one) for one in condition.shape)
                raise ValueError(
                    f"{where} has shape {array.shape}: axis {wanted} is {known[wanted]} here, the whole {fit}; crop, pad "
                    "or resample it, or choose another latent size"
                )
            target.append(known[wanted])
        elif size != wanted:
            raise ValueError(
                f"{where} has shape {array.shape}: need {_shape(condition)}, without a batch axis"
            )
        else:
            target.append(size)
    if (
        condition.minimum is not None
        and (cast < condition.minimum).any()
        or (condition.maximum is not None and (cast > condition.maximum).any())
    ):
        if condition.is_mask:
            raise ValueError(f"{where} {_unknown_labels(condition, cast)}")
        raise ValueError(
            f"{where} reaches from {cast.min()} to {cast.max()}: need {condition.minimum}..{condition.maximum}"
        )
    # Not ascontiguousarray, which gives a single number an axis.
    return np.array(np.broadcast_to(cast, target), order="C")


def _unknown_labels(condition: ConditionSpec, array: Array) -> str:
    low, high = condition.minimum, condition.maximum
    found = np.unique(array)
    unknown = [str(one) for one in found if low is not None and one < low or high is not None and one > high]
    names = ", ".join(f"{value} {name}" for value, name in enumerate(condition.labels[:32]))
    more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    return (
        f"has unknown labels {', '.join(unknown[:8])}{more}: the model knows {names or f'{low:g}..{high:g}'}; "
        "map the others to these"
    )


def _shape(condition: ConditionSpec) -> str:
    return "(" + ", ".join(str(size) for size in condition.shape) + ")"
