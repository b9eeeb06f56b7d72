"""Conditions: named numbers, whole arrays, defaults, and what is refused."""

import numpy as np
import pytest

from volcast.runtime.conditions import resolve, unconditional
from volcast.runtime.spec import ArtifactSpec

FIELDS = [
    {"name": "anterior", "minimum": 0, "maximum": 1, "default": 0.5},
    {"name": "posterior", "minimum": 0, "maximum": 1, "default": 0.25},
    {
        "name": "share",
        "minimum": 0,
        "maximum": 1,
        "default": {
            "numerator": {"": 993, "posterior": 1160},
            "denominator": {"": 2047, "anterior": 1536, "posterior": 1160},
        },
    },
]


def spec(*conditions: dict) -> ArtifactSpec:
    tensor = {"name": "x", "dtype": "float32", "shape": ["batch", 1, "d0", 6]}
    program = {
        "file": "a.onnx",
        "inputs": [tensor],
        "outputs": [],
        "nodes": 1,
        "nodes_before": 1,
        "flops": 1,
        "flops_before": 1,
    }
    axes = [("batch", 1, 4, 1), ("d0", 2, 16, 2), ("tokens", 1, 77, 1)]
    return ArtifactSpec.model_validate(
        {
            "format": 1, "name": "m", "precision": "fp32", "programs": {"schedule": program, "step": program},
            "axes": [dict(zip(("name", "minimum", "maximum", "multiple"), axis, strict=True)) for axis in axes],
            "scheduler": {}, "scale_factor": 1, "latent_shape": [1, 4, 6], "spacing_mm": [1, 1], "files": {"a.onnx": "0" * 64},
            "conditions": conditions,
        }
    )  # fmt: skip


CONTEXT = {"name": "context", "shape": [1, 3], "fields": FIELDS, "unconditional": -1.0}
HINT = {"name": "hint", "shape": [2, "d0", 6]}
TEXT = {"name": "text", "shape": ["tokens", 2], "unconditional": 0.0}
LABEL = {"name": "label", "shape": [], "dtype": "int64"}


def test_defaults_and_a_ratio_of_the_other_fields() -> None:
    values = resolve(spec(CONTEXT), {"anterior": 0.2}, {}).values
    share = (993 + 1160 * 0.25) / (2047 + 1536 * 0.2 + 1160 * 0.25)
    np.testing.assert_allclose(values["context"], [[0.2, 0.25, share]], rtol=2**-24)
    assert values["context"].dtype == np.float32
    given = resolve(spec(CONTEXT), {"share": 0.9}, {}).values["context"]
    assert given[0, 2] == np.float32(0.9)


def test_a_whole_array_and_size_one_is_repeated_along_named_axes() -> None:
    hint = np.arange(12.0).reshape(2, 1, 6)
    values = resolve(spec(HINT), {"hint": hint}, {"d0": 4}).values
    assert values["hint"].flags.c_contiguous
    np.testing.assert_array_equal(values["hint"], hint.repeat(4, axis=1))


def test_an_axis_of_its_own_takes_the_array_s_size() -> None:
    resolved = resolve(spec(TEXT), {"text": np.ones((5, 2), int)}, {"d0": 4})
    assert resolved.sizes == {"d0": 4, "tokens": 5} and resolved.values["text"].dtype == np.float32


def test_a_number_for_a_scalar_condition() -> None:
    assert resolve(spec(LABEL), {"label": 3}, {}).values["label"] == 3
    assert resolve(spec(LABEL), {"label": 3.0}, {}).values["label"].dtype == np.int64


def test_a_negative_field_s_neighbours_take_their_defaults_not_the_sample_s_values() -> None:
    given = resolve(spec(CONTEXT), {"anterior": 0.2, "posterior": 0.9, "share": 0.7}, {})
    found = unconditional(spec(CONTEXT), given, {"anterior": 0.8})["context"]
    share = (993 + 1160 * 0.25) / (2047 + 1536 * 0.8 + 1160 * 0.25)
    np.testing.assert_allclose(found, [[0.8, 0.25, share]], rtol=2**-24)


def test_the_unconditional_branch_keeps_what_has_no_unconditional_value() -> None:
    artifact = spec(CONTEXT, LABEL)
    values = unconditional(artifact, resolve(artifact, {"label": 3}, {}))
    np.testing.assert_array_equal(values["context"], np.full((1, 3), -1, np.float32))
    assert values["label"] == 3
    with pytest.raises(
        ValueError, match=r"no unconditional value; give negative=\{...\}, or leave guidance out"
    ):
        unconditional(spec(LABEL), resolve(spec(LABEL), {"label": 3}, {}))


@pytest.mark.parametrize(
    ("condition", "given", "message"),
    [
        (
            CONTEXT,
            {"Anterior": 1},
            "unknown name 'Anterior': did you mean 'anterior'.*known: context, anterior",
        ),
        (CONTEXT, {"anterior": 1.5}, r"anterior=1\.5: need 0\.\.1"),
        (CONTEXT, {"anterior": float("nan")}, "anterior=nan: need"),
        (CONTEXT, {"anterior": "much"}, "anterior=much: need"),
        (CONTEXT, {"anterior": None}, "anterior=None: need"),
        (CONTEXT, {"anterior": [1]}, r"anterior=\[1\]: need"),
        (CONTEXT, {"context": [[1, 2, 3]], "anterior": 1}, "context and its field anterior"),
        (CONTEXT, {"context": [1, 2, 3]}, r"shape \(3,\): need \(1, 3\), without a batch axis"),
        (CONTEXT, {"context": [[1, 2, float("inf")]]}, "NaN, infinity"),
        (CONTEXT, {"context": [[1, 2, 1e39]]}, "beyond float32"),
        (CONTEXT, {"context": "text"}, "dtype <U4 is not a number"),
        (CONTEXT, {"context": [[1, 2], [3]]}, "not an array of numbers"),
        (HINT, {}, r"hint is missing: give a float32 array of shape \(2, d0, 6\)"),
        (HINT, {"hint": np.zeros((2, 3, 6))}, "axis d0 is 4 here"),
        (HINT, {"hint": np.zeros((1, 4, 6))}, r"need \(2, d0, 6\)"),
        (TEXT, {"text": np.zeros((78, 2))}, r"tokens=78: need 1\.\.77; nearest: 77"),
        (LABEL, {"label": 1.5}, "fractions"),
        (LABEL, {"label": 1e30}, "beyond int64"),
    ],
)
def test_bad_conditions(condition: dict, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        resolve(spec(condition), given, {"d0": 4})
    assert "\n" not in str(error.value)


def test_no_conditions_at_all() -> None:
    with pytest.raises(ValueError, match="known: none"):
        resolve(spec(), {"x": 1}, {})


def test_a_ratio_that_divides_by_zero() -> None:
    fields = [FIELDS[0], {**FIELDS[2], "default": {"numerator": {"": 1}, "denominator": {"anterior": 1}}}]
    artifact = spec({"name": "context", "shape": [2], "fields": fields})
    with pytest.raises(ValueError, match="divides by zero"):
        resolve(artifact, {"anterior": 0.0}, {})
