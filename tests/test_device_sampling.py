"""Requests to a sampler on a device: in turns, let go of, interrupted, in threads, within a memory limit."""

import gc
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from volcast import Inpaint
from volcast.runtime.device import sampling, step_loop
from volcast.runtime.engine_cuda import CudaEngine
from volcast.runtime.pipeline import Model, load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL, TINY = (4, 8, 4), (4, 4, 4)
TASKS = Path("/proc/self/task")


@pytest.fixture(scope="module")
def model(built: Path) -> Model:
    return load(built, CudaEngine(DEVICE))


def sampler(model: Model) -> sampling.DeviceSampler:
    found = model._sampler
    assert isinstance(found, sampling.DeviceSampler)
    return found


def test_requests_may_take_turns(model: Model) -> None:
    """Each batch is decoded while its caller has the one before; the other's request must not write there."""
    alone = [list(model.sample_many(3, seed, size=TINY, steps=2)) for seed in (11, 12)]
    turns = zip(*(model.sample_many(3, seed, size=TINY, steps=2) for seed in (11, 12)), strict=True)
    for number, volumes in enumerate(turns):
        for one, other in zip(volumes, alone, strict=True):
            np.testing.assert_array_equal(one.array, other[number].array)


def test_samples_run_apart_in_the_memory_of_the_batch(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(built, CudaEngine(DEVICE))
    alone = model.sample(14, size=TINY, steps=1).array
    arenas = []

    def all_apart(network: Any) -> frozenset[str]:
        arenas.append(network.arena.data_ptr())
        return frozenset(call.operation.outputs[0] for call in network.calls if call.samples is not None)

    monkeypatch.setattr(step_loop, "find_variant", all_apart)
    np.testing.assert_array_equal(next(model.sample_many(2, 14, batch=2, size=TINY, steps=1)).array, alone)
    network = next(reversed(sampler(model)._kept.values())).loop._network
    assert arenas == [network.arena.data_ptr()] and len(network.per_sample) > 100


def test_nothing_runs_on_for_a_caller_who_takes_no_more(model: Model) -> None:
    volumes = model.sample_many(3, 11, size=TINY, steps=2)
    next(volumes)
    assert [one.pending is None for one in sampler(model)._kept.values()].count(False) == 1
    volumes.close()
    assert all(one.pending is None for one in sampler(model)._kept.values())

    def fail(done: int, total: int) -> None:
        if done == 3:  # the first batch is being decoded
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        list(model.sample_many(2, 11, size=TINY, steps=2, on_step=fail))
    assert all(one.pending is None for one in sampler(model)._kept.values())


def test_steps_that_nobody_watches_go_out_together(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "TOGETHER", 4)
    for steps, launches in [(4, 1), (6, 2)]:  # 3 at once: a divisor of the steps, at most 4
        watched = model.sample(6, size=TINY, steps=steps, on_step=lambda done, total: None)
        assert np.array_equal(model.sample(6, size=TINY, steps=steps).array, watched.array)
        assert next(reversed(sampler(model)._kept.values())).loop._several[1] == launches


def test_ctrl_c_needs_no_callback(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "TOGETHER", 2)
    with pytest.raises(ZeroDivisionError):  # captured, and let go of after a step
        model.sample(6, size=TINY, steps=1000, on_step=lambda done, total: 1 // 0)
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        model.sample(6, size=TINY, steps=1000)
    timer.join()
    assert 0 < int(next(reversed(sampler(model)._kept.values())).loop.counter[0]) < 1000


def alone(built: Path, size: tuple[int, ...], batch: int = 1) -> int:
    (report, *_) = [
        one.report
        for one in load(built, CudaEngine(DEVICE)).sample_many(batch, 9, batch=batch, size=size, steps=1)
    ]
    assert report is not None
    return report.device_bytes


def test_shapes_are_kept_where_they_fit_together(built: Path) -> None:
    """Where not, the last has the memory for itself: it is decoded at once, with previews."""
    for limit, kept in ((2**40, 2), (alone(built, SMALL) + 1, 1)):
        model = load(built, CudaEngine(DEVICE, memory_limit=limit))
        for shape in (TINY, SMALL):
            report = model.sample(9, size=shape, steps=1).report
            assert report is not None and report.device_bytes <= limit
        assert len(sampler(model)._kept) == kept
        assert all(one.decoding.previews for one in sampler(model)._kept.values())


def test_a_loop_goes_for_another_s_sake_though_its_images_are_awaited(built: Path) -> None:
    model = load(built, CudaEngine(DEVICE, memory_limit=alone(built, TINY, 2) + 1))
    loops: list[Any] = []

    def note(done: int, total: int) -> None:
        loops.append(weakref.ref(next(reversed(sampler(model)._kept.values())).loop))

    volumes = model.sample_many(3, 9, batch=2, size=TINY, steps=1, on_step=note)  # 2, then 1
    first = next(volumes)
    assert loops[0]() is None and loops[1]() is not None
    rest = list(volumes)
    for ours, theirs in zip((first, *rest), model.sample_many(3, 9, size=TINY, steps=1), strict=True):
        np.testing.assert_array_equal(ours.array, theirs.array)


@pytest.mark.skipif(not TASKS.exists(), reason="needs Linux's list of threads")
def test_threads_and_memory_come_to_rest(built: Path) -> None:
    load(built, CudaEngine(DEVICE)).sample(
        0, size=(4, 4, 4), steps=2
    )  # PyTorch's and ONNX Runtime's own pools
    gc.collect()
    before = set(TASKS.iterdir())  # by id: threads of earlier tests may end meanwhile
    model = load(built, CudaEngine(DEVICE))
    gc.disable()
    try:
        used, kept = set[int](), []
        for size in [(4, 4, 4), (4, 4, 8), (4, 8, 4), (8, 4, 4)]:
            model.sample(0, size=size, steps=2)
            used.add(len(set(TASKS.iterdir()) - before))
            kept += [
                weakref.ref(part)
                for one in sampler(model)._kept.values()
                for part in (one.loop, one.decoding)
            ]
        assert len(used) == 1
        # Those that were pushed out are gone, with nobody to look for cycles.
        assert len({part() for part in kept} - {None}) == 4
        weights = weakref.ref(sampler(model)._model)
        del model
        assert weights() is None
    finally:
        gc.enable()
    gc.collect()
    assert set(TASKS.iterdir()) <= before


def test_models_open_one_after_the_other(built: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch captures one graph at a time in a process."""
    open_decoder, inside, most = sampling.open_decoder, [0], [0]

    def slowly(*arguments: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.2)  # time for the other
        inside[0] -= 1
        return open_decoder(*arguments)

    monkeypatch.setattr(sampling, "open_decoder", slowly)
    engine, found = CudaEngine(DEVICE), dict[int, Any]()
    models = [load(built, engine) for _ in range(2)]

    def run(place: int) -> None:
        found[place] = models[place].sample(13, size=TINY, steps=2).array

    threads = [threading.Thread(target=run, args=[place]) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    for place in range(2):
        np.testing.assert_array_equal(found[place], model.sample(13, size=TINY, steps=2).array)


def test_memory_for_the_loop_comes_before_the_noise(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*arguments: Any) -> Any:
        return torch.empty(2**60, dtype=torch.uint8, device=DEVICE)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "StepLoop", too_large)
        patch.setattr(sampling, "first_latent", lambda *arguments: pytest.fail("noise for nothing"))
        with pytest.raises(
            ValueError, match=r"\[cuda\] out of memory: .*smaller size or batch, or --memory-limit"
        ):
            model.sample(0, size=(4, 4, 12), steps=2)
    assert np.isfinite(model.sample(0, size=TINY, steps=2).array).all()


def test_inpainting_is_refused_before_any_work(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "encode", None)
    image = np.zeros((16, 32, 16), np.float32)
    with pytest.raises(
        ValueError, match=r"\[sample\] inpaint: the engine cuda does not; load the model with openvino"
    ):
        model.sample(image=image, inpaint=Inpaint(image))
