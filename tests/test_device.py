"""What a device's failures become: one line with the remedy, and a process that lives on."""

import contextlib
import weakref
from typing import Any

import pytest
import torch

from volcast import _core
from volcast.runtime.device.device import Device, open_device
from volcast.runtime.device.graphs import MARGIN, CudaGraphs, HostGraphs, untracked


@pytest.fixture
def device() -> Device:
    return open_device("cpu")


def failure(code: int) -> _core.DeviceError:
    return _core.Driver.host().error("launch", code)


def test_memory_that_runs_out_leaves_the_device_usable(device: Device) -> None:
    with (
        pytest.raises(ValueError, match=r"launch: CUDA_ERROR_OUT_OF_MEMORY .*--memory-limit"),
        device.errors(),
    ):
        raise failure(2)
    with (
        pytest.raises(
            ValueError, match=r"\[cuda\] out of memory: .*smaller size or batch, or --memory-limit"
        ),
        device.errors(),
    ):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")
    with device.errors():
        pass


@pytest.mark.parametrize("code", [700, 719])
def test_a_lost_context_is_named_at_every_later_request(code: int) -> None:
    device = open_device("cpu")
    for _ in range(2):  # the second time it is not asked again
        with (
            pytest.raises(ValueError, match=r"launch: CUDA_ERROR_.*lost the GPU: start a new one"),
            device.errors(),
        ):
            raise failure(code)
    other = open_device("cpu")
    with other.errors():
        pass


def test_pytorch_s_own_errors_are_read_by_their_number(device: Device) -> None:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    error.error_code = 700  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="PyTorch: CUDA_ERROR_7.*lost the GPU"), device.errors():
        raise error
    with pytest.raises(ValueError, match="PyTorch: CUDA_ERROR_7.*lost the GPU"), device.errors():
        raise AssertionError("not reached: the device is lost")


def test_memory_that_pytorch_s_cpu_lacks_is_told_alike(device: Device) -> None:
    for error in (MemoryError, RuntimeError):
        with (
            pytest.raises(ValueError, match=r"\[cuda\] out of memory: .+; give a smaller size"),
            device.errors(),
        ):
            if error is MemoryError:
                raise MemoryError("Unable to allocate 16.0 GiB for an array")
            torch.empty(2**60, dtype=torch.uint8)


def test_a_lost_context_is_seen_behind_a_library_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device("cpu")

    def dead() -> None:
        raise failure(700)

    monkeypatch.setattr(device.graphs, "stream", dead)
    for _ in range(2):
        with pytest.raises(ValueError, match="lost the GPU: start a new one"), device.errors():
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


def test_other_errors_pass_through(device: Device) -> None:
    with pytest.raises(KeyboardInterrupt), device.errors():
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="mine"), device.errors():
        raise RuntimeError("mine")

    class Own(RuntimeError):
        pass

    with pytest.raises(Own, match="no place could be allocated"), device.errors():
        raise Own("no place could be allocated")
    with device.errors():
        pass


def test_recorded_work_runs_in_order_and_repeats() -> None:
    graphs = HostGraphs()
    stream = graphs.stream()
    seen: list[bool] = []
    graph = graphs.record(lambda: seen.append(torch.is_inference_mode_enabled()), stream)
    seen.clear()
    graphs.executable(graph, repeats=3).launch(stream)
    direct = graphs.direct(lambda: seen.append(False))
    direct.launch(stream)
    stream.synchronize()
    assert seen == [True, True, True, False]


def test_page_locked_memory_is_not_found_by_its_address() -> None:
    block = torch.empty(MARGIN + 24, dtype=torch.uint8)
    within = untracked(block, (2, 3), torch.int32)
    assert within.shape == (2, 3) and within.data_ptr() == block.data_ptr() + MARGIN
    assert within.untyped_storage().data_ptr() == within.data_ptr()
    within.fill_(7)
    assert block[MARGIN:].view(torch.int32).tolist() == [7] * 6
    memory = weakref.ref(block.untyped_storage())
    del block
    assert memory() is not None and within.sum() == 42
    del within
    assert memory() is None


class Spy:
    """Stands for torch.cuda, of which a CPU has nothing: what was asked of it, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **settings: self._called(name)

    def _called(self, name: str) -> Any:
        self.calls.append(name)
        context = contextlib.nullcontext()
        context.wait_stream = lambda other: self.calls.append("waits")  # type: ignore[attr-defined]
        context.synchronize = lambda: self.calls.append("synchronize")  # type: ignore[attr-defined]
        return context


def test_a_captured_graph_keeps_what_its_function_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph knows addresses alone. The host's graphs call their function, so they cannot show the fault."""
    spy = Spy()
    monkeypatch.setattr(torch, "cuda", spy)
    graphs = object.__new__(CudaGraphs)
    graphs._device = torch.device("cuda", 0)
    tensor = torch.zeros(3)
    memory, runs = weakref.ref(tensor), []

    def function(tensor: torch.Tensor = tensor) -> None:
        runs.append("captured" if spy.calls[-1] == "graph" else "warm")
        tensor.add_(1)

    recorded = graphs.record(function, _core.Stream(_core.Driver.host()))
    del function, tensor
    assert runs == ["warm", "warm", "captured"] and memory() is not None
    order = ["ExternalStream", "current_stream", "waits", "stream", "synchronize", "CUDAGraph", "graph"]
    assert spy.calls == order
    del recorded
    assert memory() is None
