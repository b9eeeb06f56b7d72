"""NVIDIA Triton's Python backend for any volcast artifact: `execute` only hands requests on, threads answer them.

What it serves stands in config.pbtxt: `artifact` (a folder; a relative one beside this file), `artifact_sha256` (of its
manifest; empty: any), `engine`, `threads`, `active` and `queue` (samples that take turns, and that wait).
"""

import ctypes
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import triton_python_backend_utils as pb_utils

# The process that Triton starts this in leaves PYTHONPATH out.
sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]

from volcast.runtime.artifact import MANIFEST
from volcast.runtime.atomic import sha256
from volcast.runtime.interface import Array
from volcast.runtime.pipeline import load
from volcast.runtime.probe import warm_up
from volcast.runtime.service import Reason, Reply, Service
from volcast.triton_repo.metrics import Metrics

CODES = {
    "invalid": "INVALID_ARG",
    "unavailable": "UNAVAILABLE",
    "cancelled": "CANCELLED",
    "internal": "INTERNAL",
}


USED = b"used_dltensor"


def tensor(name: str, value: Array) -> Any:
    capsule = value.__dlpack__()  # type: ignore[misc]
    made = pb_utils.Tensor.from_dlpack(name, capsule)
    # Older releases mark a capsule as used by another name than the standard's, which numpy complains about.
    ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), USED)
    return made


@final
class Sender(Reply):
    """Triton 24.10 dies of a question about a request that has ended, and keeps one open for ever whose caller has gone
    and is still sent to: hence the lock, and nothing but the end for who has gone."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._lock, self._ended = threading.RLock(), False

    def send(self, tensors: Mapping[str, Array]) -> None:
        outputs = [tensor(name, value) for name, value in tensors.items()]
        with self._lock:
            if not self.cancelled():
                self._sender.send(pb_utils.InferenceResponse(outputs))

    def finish(self) -> None:
        with self._lock:
            self._ended = True
            self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, reason: Reason, text: str) -> None:
        error = pb_utils.TritonError(text, getattr(pb_utils.TritonError, CODES[reason]))
        with self._lock:
            if not self.cancelled():
                self._sender.send(pb_utils.InferenceResponse(error=error))
            self.finish()

    def cancelled(self) -> bool:
        with self._lock:
            return not self._ended and bool(self._sender.is_cancelled())


@final
class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        given = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        if args["model_instance_kind"] == "GPU":
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        artifact = Path(args["model_repository"], args["model_version"], given["artifact"])
        threads = int(given["threads"]) if given.get("threads") else None
        if given.get("artifact_sha256") not in ("", None, sha256(artifact / MANIFEST)):
            raise ValueError(
                f"[serve] {artifact} is not the artifact that config.pbtxt names: serve it again"
            )
        active, queue = int(given["active"]), int(given["queue"])
        model = load(artifact, given["engine"], threads, active=active, queue=queue)
        self._service = Service(model, most=active + queue)
        try:
            # Not Triton's model_warmup: release 24.10 calls a model ready whose warm-up failed, or crashes of it.
            warm_up(self._service, model.spec)
        except ValueError:
            self._service.close()
            raise
        self._metrics = Metrics(
            self._service, {"model": args["model_name"], "version": args["model_version"]}
        )

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            # DLPack, since older releases misread numpy 2's arrays. Triton takes its buffers back with the request.
            tensors = {tensor.name(): np.from_dlpack(tensor).copy() for tensor in request.inputs()}
            self._service.accept(tensors, Sender(request))

    def finalize(self) -> None:
        self._service.close()
        self._metrics.close()
