"""The weights of stripped TensorRT plans: read from the artifact's ONNX files and put into the engine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .initializers import read_initializers
from .plans import Weight
from .tensorrt_library import Library

WEIGHTS = "weights.bin"


def refit(library: Library, engine: Any, skeleton: bytes, weights: Sequence[Weight], source: Path) -> None:
    """Give `engine` its weights, those of the ONNX file `source`.

    Raises ValueError where the file lacks one or the library refuses them.
    """
    trt = library.trt
    library.log.clear()
    refitter = trt.Refitter(engine, library.log)
    parser = trt.OnnxParserRefitter(refitter, library.log)
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder) / WEIGHTS, weights, source)
        done = parser.refit_from_bytes(skeleton, str(Path(folder) / "skeleton.onnx"))
        if not done or not refitter.refit_cuda_engine():
            raise ValueError(
                f"[{library.target}] cannot put the weights into {source.stem}: {library.log.reason()}"
            )


def write_weights(path: Path, weights: Sequence[Weight], source: Path) -> None:
    """The weights one after the other, each rounded to its type, to nearest and ties to even."""
    stored = read_initializers(source)
    with open(path, "wb") as stream:
        for weight in weights:
            if weight.source not in stored:
                raise ValueError(
                    f"[plans] {source.name} lacks {weight.source}; build the plans again with `volcast build`"
                )
            stream.write(rounded(stored[weight.source], weight.dtype).tobytes())


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 in another type; bfloat16, which NumPy lacks, as its bits."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
