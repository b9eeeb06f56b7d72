"""Which device runs the programs, and what its failures mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch

from volcast import _core

from .graphs import CudaGraphs, Graphs, HostGraphs

OLDEST = (8, 0)
UNKNOWN = 999  # CUDA_ERROR_UNKNOWN
INSTALL = "install PyTorch with CUDA (https://pytorch.org) and `pip install 'volcast[cuda]'`"


@final
class Device:
    """One device and its graphs. After a failure that kills the CUDA context it refuses every further request.

    Attributes:
        torch: the device as PyTorch names it.
        graphs: records work on it.
    """

    def __init__(self, device: torch.device, graphs: Graphs) -> None:
        self.torch = device
        self.graphs = graphs
        self._lost: str | None = None

    def free_bytes(self) -> int | None:
        """What the device has left; None on the CPU, where nobody can tell."""
        if self.torch.type != "cuda":
            return None
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.torch)[0])

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn a device's failures into one line with the remedy (ValueError). Memory is given back; a lost context
        cannot be: the process lives on, and says so at every request."""
        if self._lost is not None:
            raise ValueError(self._lost)
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.torch.type == "cuda":
                torch.cuda.empty_cache()
            raise ValueError(
                f"[cuda] out of memory: {_line(error)}; give a smaller size or batch, or --memory-limit"
            ) from error
        except _core.DeviceError as error:
            raise self._failed(error) from error
        except torch.AcceleratorError as error:
            code = getattr(error, "error_code", UNKNOWN)
            raise self._failed(self.graphs.driver.error("PyTorch", code)) from error

    def _failed(self, error: _core.DeviceError) -> ValueError:
        if error.lost:
            self._lost = _line(error)
        return ValueError(_line(error))


def open_device(name: str) -> Device:
    """The device `cuda`, `cuda:1` or `cpu`. Raises ValueError where there is no such GPU or it is too old."""
    device = torch.device(name)
    if device.type == "cpu":
        return Device(device, HostGraphs())
    if device.type != "cuda":
        raise ValueError(f"[cuda] device={name!r}: need cuda, cuda:0 .. or cpu")
    if torch.version.cuda is None:
        raise ValueError(f"[cuda] PyTorch {torch.__version__} was built without CUDA; {INSTALL}")
    if not torch.cuda.is_available():
        raise ValueError("[cuda] no NVIDIA GPU or driver; run `nvidia-smi`, or use --engine auto")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"[cuda] device={name!r}: this machine has {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", index)
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise ValueError(
            f"[cuda] {torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}: "
            f"need {OLDEST[0]}.{OLDEST[1]} or newer; use --engine onnxruntime"
        )
    return Device(device, CudaGraphs(device))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
