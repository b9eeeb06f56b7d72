"""The manifest reader: what it accepts, what it refuses, and that it never does anything else."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volcast.runtime.artifact import KINDS, digests, parse_manifest, read_artifact
from volcast.runtime.spec import ArtifactSpec


@pytest.fixture
def folder(gaussian: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gaussian, tmp_path / "artifact"))


def change(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        read_artifact(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_good_artifact_is_read(folder: Path) -> None:
    spec = read_artifact(folder)
    assert spec.name == "gaussian" and spec.axis("d0").multiple == 2
    assert spec.files == digests(folder)


def test_no_artifact(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "not a folder", "volcast export")
    refused(tmp_path, "holds no manifest.json")


def test_an_altered_or_truncated_or_missing_file(folder: Path) -> None:
    program = folder / "step.onnx"
    data = program.read_bytes()
    program.write_bytes(data[:-1])
    refused(folder, "step.onnx was altered or cut short")
    program.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    refused(folder, "step.onnx was altered")
    program.unlink()
    refused(folder, "step.onnx is missing")


def test_a_newer_format_names_both(folder: Path) -> None:
    newest = max(KINDS)
    change(folder, format=newest + 1, invention=True)
    refused(folder, f"format {newest + 1}", f"than {newest}", "upgrade volcast")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"surprise": 1}, ("surprise=1", "Extra inputs")),
        ({"format": 0}, ("format=0",)),
        ({"scale_factor": 0}, ("scale_factor=0",)),
        ({"precision": "fp8"}, ("precision='fp8'", "'fp32'")),
        ({"latent_shape": [4]}, ("latent_shape=[4]",)),
        ({"spacing_mm": [1.0, 1.0]}, ("spacing_mm",)),
        ({"programs": {}}, ("programs lack",)),
        ({"axes": []}, ("axes", "not described")),
        ({"files": {}}, ("no digest",)),
    ],
)
def test_a_bad_field_is_named_with_its_value(folder: Path, fields: dict, words: tuple) -> None:
    change(folder, **fields)
    refused(folder, *words, "volcast export")


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a/../../b", "a//b", "", ".", "a\\b", "C:x", "a\0b"]
)
def test_a_path_that_leaves_the_folder(folder: Path, name: str) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    change(folder, files={**files, name: "0" * 64})
    refused(folder, "leaves the artifact's folder or has odd characters")


def test_a_link_that_leaves_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = shutil.move(folder / "step.onnx", tmp_path / "outside.onnx")
    (folder / "step.onnx").symlink_to(outside)
    refused(folder, "step.onnx is a link that leaves")
    (folder / "step.onnx").unlink()
    shutil.move(outside, folder / "real.onnx")
    (folder / "step.onnx").symlink_to("real.onnx")
    assert read_artifact(folder).name == "gaussian"


def test_a_linked_manifest_and_a_linked_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    assert read_artifact(tmp_path / "alias").name == "gaussian"
    shutil.move(folder / "manifest.json", tmp_path / "elsewhere.json")
    (folder / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    refused(folder, "manifest.json is a link that leaves")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"format": NaN}', "NaN is not a number"),
        (b'{"format": 1, "format": 1}', "stands twice"),
        (b"[" * 100_000 + b"]" * 100_000, "nested 100000 levels"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "nested 33 levels"),
        (b'"' + b"[" * 100 + b'"', "manifest="),
        (b"9" * 5000, "not valid JSON"),
        (b"[]", "manifest=[]"),
        (b" " * (2**22 + 1), "bytes"),
    ],
)
def test_odd_json(text: bytes, word: str) -> None:
    with pytest.raises(ValueError, match=word.replace("[", r"\[").replace("]", r"\]")) as error:
        parse_manifest(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([]), st.just({}),
    st.sampled_from(["../x", "batch", "d0", 2**63, -1, 1e400, "\ud800", "x" * 10_000]),
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in items for place in places(child, (*path, key)))]


def mutate(manifest: Any, path: tuple, kind: str, leaf: Any) -> Any:
    if not path:
        return leaf
    parent = manifest
    for key in path[:-1]:
        parent = parent[key]
    if kind == "replace":
        parent[path[-1]] = leaf
    elif kind == "remove":
        del parent[path[-1]]
    elif isinstance(parent, list):
        parent.insert(path[-1], leaf)
    else:
        parent[f"{path[-1]}x"] = leaf
    return manifest


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_manifests_are_read_or_refused_in_one_line(gaussian: Path, data: st.DataObject) -> None:
    manifest = copy.deepcopy(json.loads((gaussian / "manifest.json").read_text()))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(manifest)))
        kind = data.draw(st.sampled_from(["replace", "remove", "add"]))
        manifest = mutate(manifest, path, kind, data.draw(LEAVES))
        if not isinstance(manifest, (dict, list)):
            break
    try:
        spec = parse_manifest(json.dumps(manifest).encode())
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error) and str(error).startswith("[artifact]")
    else:
        assert ArtifactSpec.model_validate_json(spec.model_dump_json()) == spec


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_bytes_are_read_or_refused_in_one_line(gaussian: Path, edits: list[tuple[int, int]]) -> None:
    text = bytearray((gaussian / "manifest.json").read_bytes())
    for place, byte in edits:
        text[place % len(text)] = byte
    try:
        parse_manifest(bytes(text))
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error)
