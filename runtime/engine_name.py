"""What the engines are called, on the command line and in Python."""

from typing import Literal

EngineName = Literal[
    "auto",
    "cuda",
    "tensorrt",
    "tensorrt-rtx",
    "openvino",
    "onnxruntime",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-tensorrt-rtx",
    "onnxruntime-openvino",
]
