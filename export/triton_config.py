"""An artifact as a model of NVIDIA Triton Inference Server: its config.pbtxt and its folder in a model repository."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import final, get_args

from volcast.runtime.atomic import atomic_folder
from volcast.runtime.engine_name import EngineName
from volcast.runtime.interface import Tensor, inputs, outputs
from volcast.runtime.spec import Manifest

ON_GPU = [
    name
    for name in get_args(EngineName)
    if name.startswith(("cuda", "tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt"))
]
_TYPES = {
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "int32": "INT32", "int64": "INT64",
    "uint8": "UINT8", "uint16": "UINT16", "uint64": "UINT64",
}  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class Serving:
    """How an artifact is served.

    Attributes:
        artifact: its folder; a relative one is looked for beside model.py.
        artifact_sha256: of its manifest, which model.py then insists on; empty: any.
        engine: as `volcast.load` takes it.
        threads: None: one a physical core.
        active: samples that take turns.
        queue: how many more may wait. The queue is the batcher's and not Triton's: a decoupled model that only hands
            requests on leaves none in Triton's, so that `dynamic_batching` and its queue policy would hold nothing.
    """

    artifact: str = "artifact"
    artifact_sha256: str = ""
    engine: EngineName = "auto"
    threads: int | None = None
    active: int = 64
    queue: int = 256


def model_name(spec: Manifest) -> str:
    """The artifact's name, in letters that a path and a URL take."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", spec.name)


def triton_config(spec: Manifest, name: str, serving: Serving = Serving()) -> str:
    """The text of config.pbtxt for a model called `name`. ValueError: an input's name is taken twice."""
    gpu = serving.engine in ON_GPU
    parameters = {
        "artifact": serving.artifact,
        "artifact_sha256": serving.artifact_sha256,
        "engine": serving.engine,
        "threads": "" if serving.threads is None else str(serving.threads),
        "active": str(serving.active),
        "queue": str(serving.queue),
    }
    lines = [
        "# Written by volcast out of the artifact's manifest; see docs/serving.md.",
        f"name: {json.dumps(name)}",
        'backend: "python"',
        "max_batch_size: 0  # samples are batched step by step inside",
        "model_transaction_policy { decoupled: true }",
        f"instance_group [ {{ kind: {'KIND_GPU' if gpu else 'KIND_CPU'} count: 1 }} ]",
    ]
    # Required ones are optional to Triton too: model.py says better what is missing.
    lines += [line for tensor in inputs(spec) for line in _tensor("input", tensor, " optional: true")]
    lines += [line for tensor in outputs(spec) for line in _tensor("output", tensor)]
    for key, value in parameters.items():
        lines.append(f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}")
    return "\n".join([*lines, ""])


def write_model(folder: Path, name: str, spec: Manifest, serving: Serving = Serving()) -> None:
    """Write the model `name` into the repository `folder`: config.pbtxt and 1/model.py."""
    text = triton_config(spec, name, serving)
    with atomic_folder(folder / name) as model:
        (model / "config.pbtxt").write_text(text)
        (model / "1").mkdir()
        shutil.copyfile(BACKEND, model / "1" / "model.py")


BACKEND = Path(__file__).parent.parent / "triton_repo" / "hippocampus" / "1" / "model.py"
"""The one model.py, the same for every artifact."""


def _tensor(kind: str, tensor: Tensor, rest: str = "") -> list[str]:
    dims = ", ".join(str(size) for size in tensor.shape)
    return [
        f"# {' '.join(tensor.text.split())}",
        f"{kind} {{ name: {json.dumps(tensor.name)} data_type: TYPE_{_TYPES[tensor.dtype]} dims: [ {dims} ]{rest} }}",
    ]
