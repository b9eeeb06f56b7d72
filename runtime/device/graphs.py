"""Work recorded once and launched many times: CUDA graphs, and on the CPU the host driver's.

The C++ loop and everything here sees one interface, `Executable.launch(stream)`; on the CPU a stream is a thread and a
graph's node a Python function, so that order, overlap and failures are those of a GPU.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch

from volcast import _core

Function = Callable[[], None]
WARM_UPS = 2
"""Runs before a capture: compilers, libraries' plans and workspaces come to rest."""


class Graphs(ABC):
    """Records functions of one device."""

    driver: _core.Driver

    @abstractmethod
    def record(self, function: Function, stream: _core.Stream) -> Any:
        """`function`'s launches as a graph for `executable`. It is run first, to warm up, and may run again."""

    @abstractmethod
    def executable(self, graph: Any, repeats: int = 1) -> _core.Executable:
        """The graph, `repeats` times over, ready to launch. Keep the graph as long as this."""

    @abstractmethod
    def direct(self, function: Function) -> Any:
        """`.launch(stream)` runs `function` on a stream without recording it: for work that allocates."""

    def stream(self) -> _core.Stream:
        return _core.Stream(self.driver)

    def event(self) -> _core.Event:
        return _core.Event(self.driver)


@final
class CudaGraphs(Graphs):
    """CUDA graphs, captured by PyTorch and launched through the driver."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)
        self._device = device
        self.driver = _core.Driver.cuda(device.index)

    def record(self, function: Function, stream: _core.Stream) -> torch.cuda.CUDAGraph:
        outside = torch.cuda.ExternalStream(stream.handle, self._device)  # type: ignore[no-untyped-call]
        with torch.inference_mode(), torch.cuda.stream(outside):
            for _ in range(WARM_UPS):
                function()
            outside.synchronize()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph, stream=outside, capture_error_mode="thread_local"):
                function()
        return graph

    def executable(self, graph: torch.cuda.CUDAGraph, repeats: int = 1) -> _core.Executable:
        return _core.Executable(self.driver, [graph.raw_cuda_graph()], repeats)

    def direct(self, function: Function) -> _Direct:
        return _Direct(function, self._device)


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
