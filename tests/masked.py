"""The closed form of `gaussian` with a label map: its mean is added to what the context gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from volcast.runtime.artifact import digests

SHAPE = ["o0", "o1", "o2"]


def masked(gaussian: Path, folder: Path) -> Path:
    """Write it to `folder`."""
    shutil.copytree(gaussian, folder)
    model = onnx.load(folder / "prepare.onnx")
    (old,) = (node for node in model.graph.node if "constants" in node.output)
    old.output[:] = ["own"]
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", *SHAPE]))
    model.graph.node.extend([
        helper.make_node("Cast", ["mask"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["numbers"], ["rows"], axis=1),
        helper.make_node("ReduceMean", ["rows", "one"], ["mean"], keepdims=1),
        helper.make_node("Add", ["own", "mean"], ["constants"]),
    ])  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "prepare.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["programs"]["prepare"]["inputs"].append(
        {"name": "mask", "dtype": "int64", "shape": ["batch", *SHAPE]}
    )
    manifest["conditions"].append({
        "name": "mask", "dtype": "int64", "shape": SHAPE, "minimum": 0, "maximum": 2,
        "labels": ["background", "front", "back"], "description": "a label map",
    })  # fmt: skip
    del manifest["files"]
    (folder / "manifest.json").unlink()
    manifest["files"] = digests(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return folder
