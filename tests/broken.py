"""Artifacts that load and cannot sample."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper

from volcast.runtime.artifact import digests


def without_numbers(artifact: Path, folder: Path) -> Path:
    """A copy of `artifact` in `folder` whose schedule's table is NaN."""
    shutil.copytree(artifact, folder)
    schedule = onnx.load(folder / "schedule.onnx")
    (table,) = [one for one in schedule.graph.initializer if one.name == "table"]
    table.CopyFrom(onnx.numpy_helper.from_array(np.full(list(table.dims), np.nan, np.float32), "table"))
    onnx.save(schedule, folder / "schedule.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": digests(folder)}))
    return folder
