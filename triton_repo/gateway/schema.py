"""The body of a request as a pydantic model, made from the same list of inputs that the server's config is made from."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, create_model

from volcast.runtime.interface import MOST_SAMPLES, Tensor, inputs
from volcast.runtime.spec import ArtifactSpec, ConditionSpec, Manifest

from .shapes import takes_file, takes_image

SETTINGS = (
    "seed", "num_samples", "steps", "scheduler", "guidance", "size", "priority", "deadline_s", "preview_every",
    "progress_every", "strength", "temperature", "top_k", "top_p",
)  # fmt: skip
"""The inputs that callers may set, besides images and conditions: none that chooses files, and none that sends arrays back
in JSON."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=100)]
FILE: dict[str, Any] = {"type": "string", "contentEncoding": "base64", "contentMediaType": "application/gzip"}
"""A `.nii.gz`; a `.nii` is taken as well."""


class Inpainting(BaseModel):
    """`Inpaint`, its mask as a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mask: StrictStr = Field(description="a NIfTI file in base64", json_schema_extra=FILE)
    resamples: StrictInt | None = Field(None, description="runs of each stretch of steps, a whole number")
    jump_length: StrictInt | None = Field(None, description="steps of such a stretch, a whole number")
    paste: StrictBool | None = Field(None, description="true, or false to leave the decoder's voxels")


def body_schema(spec: Manifest) -> type[BaseModel]:
    """Types only: ranges are checked by `read_request` and `make_job`, whose texts are the answer."""
    tensors = {tensor.name: tensor for tensor in inputs(spec)}
    fields: dict[str, Any] = {
        tensor.name: (_type(tensor) | None, Field(None, description=tensor.text))
        for tensor in tensors.values()
        if tensor.name in SETTINGS and (tensor.name != "strength" or takes_image(spec))
    }
    if takes_image(spec):
        text = f"{tensors['image'].text}: a NIfTI file with an affine, in base64"
        fields["image"] = (StrictStr | None, Field(None, description=text, json_schema_extra=FILE))
    if takes_image(spec) and isinstance(spec, ArtifactSpec):
        text = "a part of the image to paint anew: mask (not 0 there; a NIfTI file on the image's grid), resamples, jump_length, paste"
        fields["inpaint"] = (Inpainting | None, Field(None, description=text))
    known = {name: schema for one in spec.conditions for name, schema in _condition(spec, one).items()}
    texts = {
        "condition": "by name of up to 100 letters: numbers of fields, whole arrays as nested lists or NIfTI files in base64"
    }
    if known and isinstance(spec, ArtifactSpec):
        texts["negative"] = "with guidance: as condition, of the other branch (a negative prompt)"
    for name, text in texts.items():
        extra: Any = {"properties": known, "additionalProperties": False} if known else None
        kind = dict[Name, Number | StrictStr | list[Any]] | None
        fields[name] = (kind, Field(None, description=text, json_schema_extra=extra))
    return create_model("Generate", __config__=ConfigDict(extra="forbid", frozen=True), **fields)


def _type(tensor: Tensor) -> Any:
    if tensor.dtype == "uint8":
        return Annotated[StrictStr, Field(max_length=100)]
    if tensor.dtype == "uint64":
        # JavaScript's numbers end at 2^53.
        return StrictInt | Annotated[StrictStr, Field(max_length=20)]
    one: Any = StrictInt if tensor.dtype == "int32" else Number
    if tensor.shape == (-1,):
        return one | Annotated[list[one], Field(min_length=1, max_length=MOST_SAMPLES)]
    if tensor.shape == (1,):
        return one
    return Annotated[list[one], Field(min_length=tensor.shape[0], max_length=tensor.shape[0])]


def _condition(spec: Manifest, condition: ConditionSpec) -> dict[str, Any]:
    """The schemas of its own name and of its fields'."""
    whole: dict[str, Any] = {"type": "number" if condition.dtype == "float32" else "integer"}
    bounds = {"minimum": condition.minimum, "maximum": condition.maximum}
    whole |= {key: bound for key, bound in bounds.items() if bound is not None}
    for size in reversed(condition.shape):
        whole = {"type": "array", "items": whole}
        whole |= {"minItems": 1, "maxItems": size} if isinstance(size, int) else {}
    if takes_file(spec, condition):
        whole = {"anyOf": [whole, FILE]}
    found = {condition.name: whole | {"description": condition.description}}
    for field in condition.fields:
        found[field.name] = {"type": "number", "minimum": field.minimum, "maximum": field.maximum, "description": field.description}  # fmt: skip
    return found
