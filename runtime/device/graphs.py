"""Work recorded once and launched many times: CUDA graphs, and on the CPU the host driver's.

The C++ loop and everything here sees one interface, `Executable.launch(stream)`; on the CPU a stream is a thread and a
graph's node a Python function, so that order, overlap and failures are those of a GPU.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from volcast import _core

Function = Callable[[], None]
WARM_UPS = 2
"""Runs before a capture: compilers, libraries' plans and workspaces come to rest."""


class Graphs(ABC):
    """Records functions of one device."""

    driver: _core.Driver

    @abstractmethod
    def record(self, function: Function, stream: _core.Stream) -> Any:
        """`function`'s launches as a graph for `executable`. It is run first, to warm up, and may run again.

        The graph keeps `function`, so that what this reads and writes lives as long; one capture at a time in a process.
        """

    @abstractmethod
    def executable(self, graph: Any, repeats: int = 1) -> _core.Executable:
        """The graph, `repeats` times over, ready to launch. Keep the graph as long as this."""

    @abstractmethod
    def direct(self, function: Function) -> Any:
        """`.launch(stream)` runs `function` on a stream without recording it: for work that allocates."""

    @abstractmethod
    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory of the host that a stream writes to while the host goes on."""

    def stream(self) -> _core.Stream:
        return _core.Stream(self.driver)

    def event(self) -> _core.Event:
        return _core.Event(self.driver)


@final
class CudaGraphs(Graphs):
    """CUDA graphs, captured by PyTorch and launched through the driver."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.driver = _core.Driver.cuda(device.index)

    def record(self, function: Function, stream: _core.Stream) -> _CudaWork:
        outside = torch.cuda.ExternalStream(stream.handle, self._device)  # type: ignore[no-untyped-call]
        # What the function reads may still be under way where it was made.
        outside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.inference_mode(), torch.cuda.stream(outside):
            for _ in range(WARM_UPS):
                function()
            outside.synchronize()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph, stream=outside, capture_error_mode="thread_local"):
                function()
        return _CudaWork(graph, function)

    def executable(self, graph: _CudaWork, repeats: int = 1) -> _core.Executable:
        return _core.Executable(self.driver, [graph.graph.raw_cuda_graph()], repeats)

    def direct(self, function: Function) -> _Direct:
        return _Direct(function, self._device)

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        return untracked(torch.empty(MARGIN + size, dtype=torch.uint8, pin_memory=True), shape, dtype)


MARGIN = 64
"""Bytes before what is used of page-locked memory: PyTorch knows a block by its first address."""


def untracked(block: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The memory of `block` (uint8) behind its first MARGIN bytes, as a tensor that PyTorch does not find the block by.

    When page-locked memory is let go, PyTorch records an event on each stream that it saw write there; on a stream that
    is gone, or after a lost context, that ends the process. Let go of it when its streams are idle.
    """
    return torch.from_numpy(block.numpy()[MARGIN:]).view(dtype).view(shape)


class _CudaWork(NamedTuple):
    """A captured graph, which knows addresses alone, and its function, which keeps what lies there."""

    graph: torch.cuda.CUDAGraph
    function: Function


@final
class _Direct:
    def __init__(self, function: Function, device: torch.device) -> None:
        self._function = function
        self._device = device

    def launch(self, stream: _core.Stream) -> None:
        outside = torch.cuda.ExternalStream(stream.handle, self._device)  # type: ignore[no-untyped-call]
        with torch.inference_mode(), torch.cuda.stream(outside):
            self._function()


@final
class _HostWork:
    """A function and its graph, which refers to it weakly: Python finds no cycle that leads through the driver."""

    def __init__(self, driver: _core.Driver, function: Function) -> None:
        # Modes of PyTorch belong to a thread, and the stream's is another one than this.
        self.function = torch.inference_mode()(function)
        own = weakref.ref(self)

        def call() -> None:
            work = own()
            assert work is not None, "work was launched and let go: keep it until it has run"
            work.function()

        self.graph = _core.HostGraph(driver, call)
        self.executable = _core.Executable(driver, [self.graph.handle])

    def launch(self, stream: _core.Stream) -> None:
        self.executable.launch(stream)


@final
class HostGraphs(Graphs):
    """The same on the CPU."""

    def __init__(self) -> None:
        self.driver = _core.Driver.host()

    def record(self, function: Function, stream: _core.Stream) -> _HostWork:
        work = _HostWork(self.driver, function)
        work.launch(stream)
        stream.synchronize()
        return work

    def executable(self, graph: _HostWork, repeats: int = 1) -> _core.Executable:
        return _core.Executable(self.driver, [graph.graph.handle], repeats)

    def direct(self, function: Function) -> _HostWork:
        return _HostWork(self.driver, function)

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype)
