"""The networks as MONAI wrote them, exported to ONNX and sampled in ONNX Runtime: what one would write by hand."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any, final

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from volcast.export.networks import Decoder
from volcast.runtime.atomic import atomic_folder

from .contestant import Clock, Contestant, Task
from .contestants_monai import ddim, read_matching
from .plain_cache import OPSET


@final
class OnnxRuntimeContestant(Contestant):
    """ONNX Runtime's sessions with its default options but the threads, a Python loop, MONAI's scheduler."""

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        bundle = read_matching(task)
        self._scheduler = ddim(bundle, task.steps)
        self._scale_factor = bundle.scale_factor
        latent = bundle.autoencoder is not None
        del bundle
        assert task.plain is not None
        self._unet = _session(task.plain / "unet.onnx", task.threads)
        self._decoder = _session(task.plain / "decoder.onnx", task.threads) if latent else None
        self._noise = task.noise
        self._conditions = {name: value[None] for name, value in task.conditions.items()}

    def volume(self, clock: Clock) -> NDArray[np.float32]:
        x: NDArray[np.float32] = self._noise
        for t in self._scheduler.timesteps:
            inputs = {"x": x, "timesteps": np.array([t], np.float32), **self._conditions}
            out = clock.call("network", self._unet.run, None, inputs)[0]
            x = self._scheduler.step(torch.from_numpy(out), t, torch.from_numpy(x))[0].numpy()
        if self._decoder is None:
            return np.asarray(x[0])
        z = x / np.float32(self._scale_factor)
        image: NDArray[np.float32] = clock.call("decode", self._decoder.run, None, {"z": z})[0][0]
        return image


def export_plain(task: Task) -> None:
    """Write `unet.onnx` and `decoder.onnx` into `task.plain`, whole or not at all, with a free batch."""
    assert task.plain is not None
    bundle = read_matching(task)
    # torch.export takes a size of 1 in the example for a constant.
    x = torch.zeros(2, *bundle.latent_shape)
    examples = {"x": x, "timesteps": torch.zeros(2)}
    examples |= {name: torch.from_numpy(np.stack([v, v])) for name, v in task.conditions.items()}
    task.plain.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(task.plain, replace=True) as folder:
        _export(bundle.unet, examples, "out", folder / "unet.onnx")
        if bundle.autoencoder is not None:
            _export(Decoder(bundle.autoencoder), {"z": x}, "image", folder / "decoder.onnx")


def _export(network: torch.nn.Module, examples: dict[str, torch.Tensor], output: str, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        torch.onnx.export(
            network.eval(),
            kwargs=examples,
            f=os.fspath(path),
            input_names=list(examples),
            output_names=[output],
            dynamic_shapes={name: {0: torch.export.Dim.DYNAMIC} for name in examples},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
