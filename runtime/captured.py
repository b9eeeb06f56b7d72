"""Programs that run on a device as one launch: copies to it, the network, copies back, captured as a graph.

No torch: memory, streams and graphs are the driver's. Where the driver is its host form, the same buffers, captures and
launches are this process' own, which is how they are tested.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from .engine import Arrays, Program

Array = NDArray[Any]
AHEAD = 2
"""Steps on the device before the host waits for the first: enough to hide a launch, few to take back."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Shape and numpy's dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Network(ABC):
    """A network at fixed shapes that reads and writes contiguous device memory. Not for two threads at once.

    Attributes:
        inputs, outputs: by name, in the manifest's order.
        bytes: device memory of its own: what lies between its operators.
        capturable: whether its work can become a graph.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    bytes: int
    capturable: bool

    @abstractmethod
    def enqueue(self, addresses: Mapping[str, int], stream: _core.Stream) -> None:
        """Add a run to the stream's work: every input and output lies at its address.

        Raises ValueError for what the library refuses.
        """


@final
class Buffer:
    """A tensor on the device and its page-locked image on the host. `host` is a view of that image."""

    def __init__(self, driver: _core.Driver, tensor: Tensor) -> None:
        self.device = _core.DeviceMemory(driver, tensor.bytes)
        self.pinned = _core.PinnedMemory(driver, tensor.bytes)
        self.host: Array = np.frombuffer(memoryview(self.pinned), tensor.dtype).reshape(tensor.shape)

    @property
    def address(self) -> int:
        return self.device.address

    def send(self, stream: _core.Stream) -> None:
        stream.copy(self.device, self.pinned)

    def fetch(self, stream: _core.Stream) -> None:
        stream.copy(self.pinned, self.device)


@final
class CapturedProgram(Program):
    """One network with its buffers. Outputs are copied out: a later call does not write to them."""

    def __init__(self, driver: _core.Driver, network: Network, name: str) -> None:
        self._name, self._network = name, network
        with device_errors(name):
            self._stream = _core.Stream(driver)
            self._inputs = {key: Buffer(driver, tensor) for key, tensor in network.inputs.items()}
            self._outputs = {key: Buffer(driver, tensor) for key, tensor in network.outputs.items()}
            self._executable = capture(driver, self._stream, self._work) if network.capturable else None

    @property
    def bytes(self) -> int:
        """Device memory."""
        return self._network.bytes + sum(
            one.device.nbytes for one in (*self._inputs.values(), *self._outputs.values())
        )

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        for name, buffer in self._inputs.items():
            given = inputs[name]
            if given.shape != buffer.host.shape or given.dtype != buffer.host.dtype:
                raise ValueError(
                    f"[{self._name}] {name} is {given.dtype} {given.shape}: need {buffer.host.dtype} {buffer.host.shape}"
                )
            buffer.host[...] = given
        with device_errors(self._name):
            if self._executable is None:
                self._work()
            else:
                self._executable.launch(self._stream)
            self._stream.synchronize()
        return {name: buffer.host.copy() for name, buffer in self._outputs.items()}

    def _work(self) -> None:
        for buffer in self._inputs.values():
            buffer.send(self._stream)
        buffers = self._inputs | self._outputs
        self._network.enqueue({name: one.address for name, one in buffers.items()}, self._stream)
        for buffer in self._outputs.values():
            buffer.fetch(self._stream)


@final
class CapturedStep:
    """A step of the loop as one graph: x and its row to the device, the network, its output back, the plan's update.

    The update is the host's own code on a thread of the driver's, so that its bits are every engine's. With guidance
    the network runs twice, on the unconditional inputs and then on the conditional ones.

    Attributes:
        x: float32 `[N, C, D, H, W]`, the latent; changes while `run` is under way.
    """

    def __init__(self, driver: _core.Driver, network: Network, guided: bool) -> None:
        """Raises ValueError where memory does not suffice or the network cannot be captured."""
        if not network.capturable:
            raise ValueError("[step] the network cannot be captured")
        self._network, self._guided = network, guided
        with device_errors("step"):
            self._stream = _core.Stream(driver)
            self._shown = {key: Buffer(driver, network.inputs[key]) for key in ("x", "row")}
            given = {key: one for key, one in network.inputs.items() if key not in self._shown}
            branches = (_core.Branch.UNCONDITIONAL, _core.Branch.CONDITIONAL)[0 if guided else 1 :]
            self._given = {
                branch: {key: Buffer(driver, tensor) for key, tensor in given.items()} for branch in branches
            }
            self._outs = {branch: Buffer(driver, network.outputs["out"]) for branch in branches}
            self.x: NDArray[np.float32] = self._shown["x"].host
            self._update = _core.LatentUpdate(
                self.x, self._shown["row"].host, [one.host for one in self._outs.values()]
            )
            self._executable = capture(driver, self._stream, self._work)

    @property
    def bytes(self) -> int:
        """Device memory."""
        given = [one for branch in self._given.values() for one in branch.values()]
        own = (*self._shown.values(), *self._outs.values(), *given)
        return self._network.bytes + sum(one.device.nbytes for one in own)

    def run(
        self,
        plan: _core.Plan,
        x: NDArray[np.float32],
        rows: NDArray[np.float32],
        branches: Mapping[_core.Branch, Mapping[str, Array]],
        seeds: NDArray[np.uint64],
        samples: NDArray[np.uint64],
        guidance: float | None,
        after: Callable[[int, int], None],
        ahead: int = AHEAD,
    ) -> float:
        """Every row of the plan; x becomes the result. The seconds that it took.

        `after(done, steps)` follows each step, and what it raises ends the loop within `ahead` steps; with `ahead` 1
        `self.x` is then the latent after that step. Raises ValueError for a value that is not finite.
        """

        def told(done: int, steps: int) -> None:
            self._check()
            after(done, steps)

        with device_errors("loop"):
            for branch, buffers in self._given.items():
                for name, buffer in buffers.items():
                    buffer.host[...] = branches[branch][name]
                    buffer.send(self._stream)
            self._stream.synchronize()
            self.x[...] = x
            self._update.start(plan, rows, seeds, samples, guidance)
            timing = _core.run_steps(self._executable, self._stream, len(plan), ahead=ahead, on_step=told)
        self._check()
        x[...] = self.x
        return timing.total_s

    def _check(self) -> None:
        if self._update.failure:
            raise ValueError(self._update.failure)

    def _work(self) -> None:
        for buffer in self._shown.values():
            buffer.send(self._stream)
        for branch, out in self._outs.items():
            read = self._shown | self._given[branch]
            addresses = {name: one.address for name, one in read.items()} | {"out": out.address}
            self._network.enqueue(addresses, self._stream)
        for out in self._outs.values():
            out.fetch(self._stream)
        self._update.enqueue(self._stream)


def capture(driver: _core.Driver, stream: _core.Stream, work: Callable[[], None]) -> _core.Executable:
    """What `work` adds to the stream, ready to launch."""
    work()  # a library's first run may allocate or compile, which a capture forbids
    stream.synchronize()
    stream.begin_capture()
    try:
        work()
    finally:
        graph = stream.end_capture()
    return _core.Executable(driver, [graph.handle])


@contextmanager
def device_errors(operation: str) -> Iterator[None]:
    """Turn the driver's failures into one line with the remedy (ValueError)."""
    try:
        yield
    except _core.DeviceError as error:
        raise ValueError(f"[{operation}] {' '.join(str(error).split())[:300]}") from error
