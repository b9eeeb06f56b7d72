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
        """Turn a device's failures into one line with the remedy (ValueError). Memory is given back.

        A lost context cannot be: what PyTorch, cuDNN and the compiled kernels hold dies with it, and no call of the
        driver brings it back to them. The process lives on and says so at every request; a new one has the GPU again.
        """
        if self._lost is not None:
            raise ValueError(self._lost)
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._out_of_memory(error) from error
        except _core.DeviceError as error:
            raise self._failed(error) from error
        except torch.AcceleratorError as error:
            code = getattr(error, "error_code", UNKNOWN)
            raise self._failed(self.graphs.driver.error("PyTorch", code)) from error
        except RuntimeError as error:
            # What PyTorch's allocator on a CPU, its libraries and Triton raise; subclasses are a caller's own.
            if type(error) is RuntimeError:
                self._check_context(error)
                if "alloc" in str(error).lower() or "out of memory" in str(error).lower():
                    raise self._out_of_memory(error) from error
            raise

    def _check_context(self, error: RuntimeError) -> None:
        """Raise ValueError where the context is lost: libraries say it in their own words."""
        try:
            self.graphs.stream().synchronize()
        except _core.DeviceError as found:
            raise self._failed(found) from error

    def _out_of_memory(self, error: BaseException) -> ValueError:
        if self.torch.type == "cuda":
            torch.cuda.empty_cache()
        return ValueError(
            f"[cuda] out of memory: {_line(error)}; give a smaller size or batch, or --memory-limit"
        )

    def _failed(self, error: _core.DeviceError) -> ValueError:
        if error.lost:
            self._lost = _line(error)
        return ValueError(_line(error))


def open_device(name: str) -> Device:
    """The device `cuda`, `cuda:1` or `cpu`. Raises ValueError where there is no such GPU or it is too old."""
    needed = f"[cuda] device={name!r}: need cuda, cuda:0 .. or cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(needed) from error
    if device.type == "cpu":
        return Device(device, HostGraphs())
    if device.type != "cuda":
        raise ValueError(needed)
    if torch.version.cuda is None:
        raise ValueError(f"[cuda] PyTorch {torch.__version__} was built without CUDA; {INSTALL}")
    if not torch.cuda.is_available():
        raise ValueError("[cuda] no NVIDIA GPU or driver; run `nvidia-smi`, or use --engine auto")
    try:
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"[cuda] device={name!r}: this machine has {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", index)
        capability = torch.cuda.get_device_capability(device)
    except RuntimeError as error:  # a driver that is too old, a GPU that another process has for itself
        raise ValueError(f"[cuda] device={name!r}: {_line(error)}; see what `nvidia-smi` says") from error
    if capability < OLDEST:
        raise ValueError(
            f"[cuda] {torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}: "
            f"need {OLDEST[0]}.{OLDEST[1]} or newer; use --engine onnxruntime"
        )
    # Products in half precision are summed in float32 to the end: split-K would add its parts in half.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return Device(device, CudaGraphs(device))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
