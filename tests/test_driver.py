"""csrc/driver, device: streams, events, graphs and errors; on the host form and, without graphs, on a GPU."""

import pickle
import threading
from pathlib import Path

import pytest

from volcast import _core

GPU = Path("/dev/nvidia0").exists()


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.skipif(not GPU, reason="no GPU"))])
def driver(request):
    return _core.Driver.host() if request.param == "host" else _core.Driver.cuda()


@pytest.fixture
def host():
    return _core.Driver.host()


def test_a_driver_tells_what_it_is(driver):
    assert driver.name in {"host", "cuda"}
    assert 12000 <= driver.version < 100000


def test_an_event_that_was_never_recorded_is_done(driver):
    event, stream = _core.Event(driver), _core.Stream(driver)
    assert event.done()
    event.synchronize()
    stream.wait(event)
    stream.synchronize()


def test_a_recorded_event_comes_to_pass(driver):
    one, two, event = _core.Stream(driver), _core.Stream(driver), _core.Event(driver)
    for _ in range(100):
        one.record(event)
        two.wait(event)
        two.synchronize()
        assert event.done()
    event.synchronize()


def test_handles_tell_streams_apart(driver):
    streams = [_core.Stream(driver) for _ in range(4)]
    assert len({stream.handle for stream in streams} - {0}) == 4


def test_any_thread_may_use_a_stream(driver):
    stream, event, done = _core.Stream(driver), _core.Event(driver), []

    def work():
        for _ in range(50):
            stream.record(event)
            event.synchronize()
        stream.synchronize()
        done.append(_core.Stream(driver).handle)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_objects_of_two_drivers_do_not_meet(host):
    with pytest.raises(
        ValueError, match=r"\[record\] objects of driver host and of driver cuda: need both of one"
    ):
        _core.Stream(host).record(_core.Event(_core.Driver.cuda()))


@pytest.mark.skipif(GPU, reason="has a GPU")
def test_no_driver_is_a_clear_error():
    with pytest.raises(
        ValueError, match=r"^\[cuda\] .*no NVIDIA driver .*; install driver .* or sample on the CPU$"
    ):
        _core.Driver.cuda()


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_no_such_gpu_is_a_clear_error():
    with pytest.raises(
        ValueError, match=r"^\[cuda\] open device 1000: CUDA_ERROR_INVALID_DEVICE .*nvidia-smi"
    ):
        _core.Driver.cuda(1000)


LOST = (214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911)


@pytest.mark.parametrize("code", [1, 2, 4, 100, 101, 201, 209, 400, 600, 701, 720, 801, 900, 999, *LOST])
def test_errors_say_whether_the_gpu_is_lost(driver, code):
    error = driver.error("work", code)
    assert isinstance(error, _core.DeviceError) and isinstance(error, RuntimeError)
    assert (error.code, error.lost) == (code, code in LOST)
    assert str(error).startswith(f"[{driver.name}] work: {error.name} (")
    assert ("start a new one" in str(error)) == error.lost and "\n" not in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.code, again.name, again.lost) == (str(error), code, error.name, error.lost)


@pytest.mark.parametrize(
    ("code", "name", "remedy"),
    [
        (2, "CUDA_ERROR_OUT_OF_MEMORY", "smaller size or batch"),
        (4, "CUDA_ERROR_DEINITIALIZED", "the process is exiting"),
        (101, "CUDA_ERROR_INVALID_DEVICE", "nvidia-smi"),
        (719, "CUDA_ERROR_LAUNCH_FAILED", "start a new one"),
    ],
)
def test_errors_have_names_and_remedies(driver, code, name, remedy):
    error = driver.error("work", code)
    assert error.name == name
    assert str(error).startswith(f"[{driver.name}] work: {name} (")
    assert remedy in str(error)


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_host_graphs_need_the_host_form():
    with pytest.raises(ValueError, match=r"\[HostGraph\] driver=cuda: need the host form"):
        _core.HostGraph(_core.Driver.cuda(), print)
