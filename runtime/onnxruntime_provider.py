"""ONNX Runtime's execution providers: what volcast calls them, how to get each, what it tells them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, final


@final
@dataclass(frozen=True, kw_only=True)
class Provider:
    """One execution provider.

    Attributes:
        name: ONNX Runtime's.
        device: the kind of device that it is used on.
        plugin: the package that brings it to any ONNX Runtime (a plug-in provider); None: only builds of ONNX Runtime
            that have it inside.
        install: how to get it.
        unlimited: why no memory limit can be kept on it, and which engine keeps one on the same device.
        options: its settings, for results in float32.
        has_norms: whether it takes GroupNormalization in one piece. Where not, ONNX Runtime puts elementary operators in
            its place, whose sizes must be constants first: what computes with sizes belongs to the CPU.
    """

    name: str
    device: Literal["CPU", "GPU"]
    install: str
    unlimited: str
    plugin: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    has_norms: bool = True

    def settings(self, threads: int) -> dict[str, str]:
        """`options`, and for a provider on the CPU the threads inside an operator."""
        if self.device == "GPU":
            return dict(self.options)
        # Without the hint OpenVINO computes in bfloat16 on processors that have it: 1e-2 off.
        config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1",
                  "INFERENCE_NUM_THREADS": str(threads)}  # fmt: skip
        return {**dict(self.options), "load_config": json.dumps({"CPU": config})}


# Builds of ONNX Runtime share one module: two side by side overwrite each other's files.
_GPU_BUILD = "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
_BUILDS = "it builds its engines when a program is opened, and does not tell what they take"

PROVIDERS = {
    "onnxruntime-cuda": Provider(
        name="CUDAExecutionProvider",
        device="GPU",
        install=_GPU_BUILD,
        unlimited="cuDNN's workspaces are known when they are taken, and where its arena ends (gpu_mem_limit) a decode fails "
        "after the sampling; use --engine cuda",
        options=(("use_tf32", "0"),),
        has_norms=False,
    ),
    "onnxruntime-tensorrt": Provider(
        name="TensorrtExecutionProvider",
        device="GPU",
        install=f"{_GPU_BUILD} tensorrt",
        unlimited=f"{_BUILDS}; use --engine tensorrt",
    ),
    "onnxruntime-tensorrt-rtx": Provider(
        name="NvTensorRTRTXExecutionProvider",
        device="GPU",
        install="pip install onnxruntime-ep-nv-tensorrt-rtx-cu13",
        unlimited=f"{_BUILDS}; use --engine tensorrt-rtx",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
    ),
    "onnxruntime-openvino": Provider(
        name="OpenVINOExecutionProvider",
        device="CPU",
        install="pip install onnxruntime-ep-openvino",
        unlimited="what OpenVINO takes inside of ONNX Runtime is not foretold; use --engine openvino",
        plugin="onnxruntime_ep_openvino",
    ),
}
"""By the engine's name. The provider for the CPU is the engine "onnxruntime"."""
