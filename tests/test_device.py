"""What a device's failures become: one line with the remedy, and a process that lives on."""

import pytest
import torch

from volcast import _core
from volcast.runtime.device.device import Device, open_device
from volcast.runtime.device.graphs import HostGraphs


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


def test_other_errors_pass_through(device: Device) -> None:
    with pytest.raises(KeyboardInterrupt), device.errors():
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="mine"), device.errors():
        raise RuntimeError("mine")
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
