"""Picking an engine by name, or the fastest one that is installed."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import cast, get_args

from .engine import Engine
from .engine_name import EngineName
from .onnxruntime_provider import PROVIDERS
from .sizes import parse_bytes
from .spec import ArtifactSpec, Manifest
from .token_spec import TokenSpec

INSTALL = {"openvino": "pip install 'volcast[openvino]'", "onnxruntime": "pip install onnxruntime"}
"""The engines for a CPU, the fastest first, and how to get each."""


def open_engine(
    name: str = "auto", threads: int | None = None, memory_limit: int | str | None = None
) -> Engine:
    """The engine called `name`; `auto` takes the first of `INSTALL` that is installed.

    `threads` is 1..1024; None: the physical cores that this process may use. `memory_limit` goes to the engine "cuda",
    which keeps it on the device; with others a `Model` keeps it.

    Raises:
        ValueError: an unknown or missing engine, `threads` or `memory_limit` out of range, no usable GPU or library for
            "cuda", "tensorrt", "tensorrt-rtx".
    """
    if name not in get_args(EngineName):
        raise ValueError(f"[engine] engine={name!r}: need one of {', '.join(get_args(EngineName))}")
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"[engine] threads={threads}: need 1..1024, or leave it out for one a physical core")
    limit = None if memory_limit is None else parse_bytes("engine", memory_limit)
    if name == "cuda":
        return _cuda(limit)
    if limit is not None and name in PROVIDERS:
        raise ValueError(
            f"[engine] memory_limit={memory_limit}: {name} keeps none: {PROVIDERS[name].unlimited}"
        )
    if name == "tensorrt" or name == "tensorrt-rtx":
        from .engine_tensorrt import TensorRtEngine

        return TensorRtEngine("tensorrt" if name == "tensorrt" else "tensorrt-rtx")
    installed = [engine for engine in INSTALL if find_spec(engine) is not None]
    if name == "auto" and not installed:
        raise ValueError(f"[engine] none is installed; {INSTALL['openvino']}")
    chosen = installed[0] if name == "auto" else name
    needed = "onnxruntime" if chosen in PROVIDERS else chosen
    if needed not in installed:
        raise ValueError(f"[engine] {needed} is not installed; {INSTALL[needed]}")
    count = physical_cores() if threads is None else threads
    if chosen == "openvino":
        from .engine_openvino import OpenVinoEngine

        return OpenVinoEngine(count)
    from .engine_onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(count, chosen)


def resolve_engine(name: EngineName, threads: int | None) -> tuple[EngineName, int | None]:
    """The name and the threads that `open_engine` would open; "auto" and None are left where a GPU's engine is meant,

    which is not opened: the GPU may be elsewhere. Raises as `open_engine`.
    """
    if name not in ("auto", *INSTALL):
        return name, threads
    opened = open_engine(name, threads)
    return cast(EngineName, opened.name), opened.threads


def check_engine(spec: Manifest, engine: str | Engine) -> None:
    """ValueError: an engine for another device, by its name, and a token or one-pass model, which run on none."""
    known = ("auto", *sorted(INSTALL))
    if isinstance(spec, ArtifactSpec) or isinstance(engine, Engine) or engine in known:
        return
    how = "samples token by token" if isinstance(spec, TokenSpec) else "makes an image in one pass"
    raise ValueError(f"[load] engine={engine!r}: {spec.name} {how}, on one of {', '.join(known)}")


def _cuda(limit: int | None) -> Engine:
    if find_spec("torch") is None:
        raise ValueError("[engine] cuda needs PyTorch with CUDA and Triton; pip install 'volcast[cuda]'")
    from .engine_cuda import CudaEngine

    return CudaEngine(memory_limit=limit)


def physical_cores() -> int:
    """How many physical cores the process may run on: its CPU affinity with hyper-threads counted once."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:
        return max(1, (os.cpu_count() or 2) // 2)
    cores = set()
    for cpu in cpus:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add((topology / "thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)
