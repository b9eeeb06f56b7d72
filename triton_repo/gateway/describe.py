"""What the gateway tells of its model: the list that a form is made of, and the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

import volcast
from volcast.runtime.interface import MOST_SAMPLES
from volcast.runtime.sizes import volume_shape
from volcast.runtime.spec import ArtifactSpec, ConditionSpec, Manifest
from volcast.runtime.token_spec import TokenSpec

from .refusal import STATUS
from .settings import Limits
from .shapes import takes_file, takes_image

_DIFFUSION = ["ddim", "ddpm", "pndm", "dpm-solver++"]


def model_entry(spec: Manifest, name: str, limits: Limits) -> dict[str, Any]:
    """One of `/v1/models`. `default` and `limits` hold the settings that this kind of model has, and no others."""
    own = _settings(spec, limits)
    return {
        "name": name,
        "description": spec.provenance.get("bundle", spec.name),
        "default": own["default"],
        "schedulers": own["schedulers"],
        "volume": {"shape": list(volume_shape(spec)), "spacing_mm": list(spec.spacing_mm)},
        "conditions": [_condition(spec, one) for one in spec.conditions],
        "image": takes_image(spec),
        "guidance": isinstance(spec, ArtifactSpec) and bool(spec.conditions),
        "limits": {
            **own["limits"], "num_samples": [1, MOST_SAMPLES], "priority": [-8, 8], "voxels": limits.voxels,
            "body_bytes": limits.body_bytes, "file_bytes": limits.file_bytes,
        },
    }  # fmt: skip


def _settings(spec: Manifest, limits: Limits) -> dict[str, Any]:
    if isinstance(spec, TokenSpec):
        return {
            "default": {"temperature": 1, "top_k": None, "top_p": None}, "schedulers": [],
            "limits": {"temperature": [0.01, 100], "top_k": [1, spec.num_codes], "top_p": [0.001, 1]},
        }  # fmt: skip
    if not isinstance(spec, ArtifactSpec):
        return {"default": {}, "schedulers": [], "limits": {}}
    x = next(tensor for tensor in spec.programs["step"].inputs if tensor.name == "x")
    spatial, last = spec.latent_shape[1:], spec.scheduler.noise_schedule.num_train_timesteps
    return {
        "default": {"steps": spec.scheduler.steps, "scheduler": spec.scheduler.scheduler, "size": list(spatial)},
        "schedulers": ["rflow"] if spec.scheduler.prediction_type == "flow" else _DIFFUSION,
        "limits": {
            "steps": [1, last], "guidance": [0, 100], "strength": [0, 1], "size": [_bounds(spec, size) for size in x.shape[2:]],
            "previews": limits.previews,
        },
    }  # fmt: skip


def _bounds(spec: ArtifactSpec, size: int | str) -> dict[str, int]:
    if isinstance(size, int):
        return {"minimum": size, "maximum": size, "multiple": 1}
    axis = spec.axis(size)
    return {"minimum": axis.minimum, "maximum": axis.maximum, "multiple": axis.multiple}


def _condition(spec: Manifest, condition: ConditionSpec) -> dict[str, Any]:
    fields = [
        {
            "name": one.name, "low": one.minimum, "high": one.maximum, "description": one.description,
            # A ratio of the others follows them as long as it is left out.
            "default": one.default if isinstance(one.default, float) else None,
        }
        for one in condition.fields
    ]  # fmt: skip
    return {
        "name": condition.name, "description": condition.description, "dtype": condition.dtype,
        "shape": list(condition.shape), "fields": fields, "required": not fields,
        "file": takes_file(spec, condition), "labels": list(condition.labels),
    }  # fmt: skip


def openapi(
    spec: Manifest, name: str, schema: type[BaseModel], limits: Limits, keyed: bool
) -> dict[str, Any]:
    """The OpenAPI 3.1 document; request bodies are the pydantic model's own JSON Schema."""
    body = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = body.pop("$defs", {})
    codes = sorted(STATUS)
    error = {
        "type": "object", "required": ["code", "message", "request_id"],
        "properties": {"code": {"enum": codes}, "message": {"type": "string"}, "request_id": {"type": "string"}},
    }  # fmt: skip
    binary = {"application/gzip": {"schema": {"type": "string", "contentEncoding": "binary"}}}
    generate = {
        "operationId": "generate", "summary": "Volumes, as events while they are made or as one file",
        "parameters": [{"$ref": "#/components/parameters/requestId"}],
        "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Generate"}}}},
        "responses": {
            "200": {
                "description": "Events accepted, progress, preview, volume, then end or error; or the .nii.gz of one volume",
                "content": {"text/event-stream": {"schema": {"type": "string"}}, **binary},
            },
            **_errors(400, 401, 404, 413, 429, 500, 503),
        },
    }  # fmt: skip
    volume = {
        "operationId": "volume", "summary": "A volume or preview that an event named",
        "parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}],
        "responses": {"200": {"description": "NIfTI", "content": binary}, **_errors(401, 404)},
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": f"volcast: {name}", "version": volcast.__version__},
        "security": [{"key": []}] if keyed else [],
        "paths": {
            "/v1/models": {"get": _get("models", "What is served, with all that a form needs", _errors(401))},
            f"/v1/models/{name}/generate": {"post": generate},
            "/v1/volumes/{id}": {"get": volume},
            "/health/live": {"get": _get("live", "Whether the gateway runs") | {"security": []}},
            "/health/ready": {"get": _get("ready", "Whether a volume comes out", _errors(503)) | {"security": []}},
        },
        "components": {
            "schemas": {
                "Generate": body, **definitions,
                "Error": {"type": "object", "required": ["error"], "properties": {"error": error}},
                "Model": {"type": "object", "examples": [model_entry(spec, name, limits)]},
            },
            "responses": {
                "Error": {
                    "description": "Refused",
                    "headers": {"X-Request-Id": {"schema": {"type": "string"}}, "Retry-After": {"schema": {"type": "integer"}}},
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                },
            },
            "parameters": {
                "requestId": {"name": "X-Request-Id", "in": "header", "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}},
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }  # fmt: skip


def _get(name: str, summary: str, errors: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = {"description": summary, "content": {"application/json": {"schema": {"type": "object"}}}}
    return {"operationId": name, "summary": summary, "responses": {"200": answer, **(errors or {})}}


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(one): {"$ref": "#/components/responses/Error"} for one in statuses}
