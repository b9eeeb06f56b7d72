"""The body of a request as a pydantic model, made from the same list of inputs that the server's config is made from."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, create_model

from volcast.runtime.interface import Tensor, inputs
from volcast.runtime.spec import ArtifactSpec, ConditionSpec

SETTINGS = (
    "seed", "num_samples", "steps", "scheduler", "guidance", "size", "priority", "deadline_s", "preview_every",
    "progress_every",
)  # fmt: skip
"""The inputs that callers may set, besides conditions: none that chooses files, and none that sends arrays back in JSON."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


def body_schema(spec: ArtifactSpec) -> type[BaseModel]:
    """Types only: ranges are checked by `read_request` and `make_job`, whose texts are the answer."""
    fields: dict[str, Any] = {
        tensor.name: (_type(tensor) | None, Field(None, description=tensor.text))
        for tensor in inputs(spec)
        if tensor.name in SETTINGS
    }
    known = {name: schema for one in spec.conditions for name, schema in _condition(one).items()}
    fields["condition"] = (
        dict[str, Number | list[Any]] | None,
        Field(
            None,
            description="numbers of fields, or whole arrays as nested lists, by name",
            json_schema_extra={"properties": known, "additionalProperties": False} if known else None,
        ),
    )
    return create_model("Generate", __config__=ConfigDict(extra="forbid", frozen=True), **fields)


def _type(tensor: Tensor) -> Any:
    if tensor.dtype == "uint8":
        return Annotated[StrictStr, Field(max_length=100)]
    if tensor.dtype == "uint64":
        # JavaScript's numbers end at 2^53.
        return StrictInt | Annotated[StrictStr, Field(max_length=20)]
    one: Any = StrictInt if tensor.dtype == "int32" else Number
    if tensor.shape == (1,):
        return one
    return Annotated[list[one], Field(min_length=tensor.shape[0], max_length=tensor.shape[0])]


def _condition(condition: ConditionSpec) -> dict[str, Any]:
    """The schemas of its own name and of its fields'."""
    whole: dict[str, Any] = {"type": "number" if condition.dtype == "float32" else "integer"}
    bounds = {"minimum": condition.minimum, "maximum": condition.maximum}
    whole |= {key: bound for key, bound in bounds.items() if bound is not None}
    for size in reversed(condition.shape):
        whole = {"type": "array", "items": whole}
        whole |= {"minItems": 1, "maxItems": size} if isinstance(size, int) else {}
    found = {condition.name: whole | {"description": condition.description}}
    for field in condition.fields:
        found[field.name] = {"type": "number", "minimum": field.minimum, "maximum": field.maximum, "description": field.description}  # fmt: skip
    return found
