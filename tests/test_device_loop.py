"""csrc/device_loop: launches ahead of the device, stops within that many, shows previews without waiting."""

import signal
import subprocess
import sys
import threading

import pytest

from volcast import _core

LIMIT = 30  # seconds until a thread that should have come counts as lost


@pytest.fixture
def host():
    return _core.Driver.host()


def executable(driver, function):
    graph = _core.HostGraph(driver, function)
    return _core.Executable(driver, [graph.handle])


class Counter:
    """A state that a step changes; fails or signals at a step of its choice."""

    def __init__(self, at=0, act=None):
        self.value, self.at, self.act = 0, at, act

    def __call__(self):
        self.value += 1
        if self.value == self.at:
            self.act()


class Stop(Exception):
    pass


def stop(*_):
    raise Stop("enough")


@pytest.mark.parametrize("ahead", [1, 2, 3, 100])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_every_step_runs_and_is_told(host, steps, ahead):
    stream, count, told = _core.Stream(host), Counter(), []

    def on_step(done, total):
        assert count.value >= done
        told.append((done, total))

    timing = _core.run_steps(executable(host, count), stream, steps, ahead=ahead, on_step=on_step)
    assert count.value == steps
    assert told == [(n, steps) for n in range(1, steps + 1)]
    assert timing.launches == steps
    assert 0 < timing.launch_s <= timing.total_s


def test_no_callback_is_needed(host):
    count = Counter()
    _core.run_steps(executable(host, count), _core.Stream(host), 5)
    assert count.value == 5


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_it_never_launches_more_than_ahead(host, ahead):
    """Held in its first step, a stream has `ahead` launches; what another thread launches comes next."""
    stream, order, gate, begun = _core.Stream(host), [], threading.Event(), threading.Event()

    def step():
        begun.set()
        gate.wait(LIMIT)
        order.append("step")

    loop = threading.Thread(
        target=_core.run_steps, args=(executable(host, step), stream, 20), kwargs={"ahead": ahead}
    )
    loop.start()
    assert begun.wait(LIMIT)
    launched = executable(host, lambda: order.append("between"))
    threading.Event().wait(0.2)  # time for launches that must not come
    launched.launch(stream)
    gate.set()
    loop.join()
    assert order.index("between") <= ahead and order.count("step") == 20


@pytest.mark.parametrize("ahead", [1, 2, 3, 7])
def test_a_callback_s_exception_stops_within_ahead(host, ahead):
    stream, count = _core.Stream(host), Counter()
    step = executable(host, count)

    def on_step(done, total):
        if done == 4:
            stop()

    with pytest.raises(Stop, match="enough"):
        _core.run_steps(step, stream, 1000, ahead=ahead, on_step=on_step)
    assert count.value == 4 + ahead - 1  # all that was launched has run: the device is idle
    _core.run_steps(step, stream, 10)
    assert count.value == 4 + ahead - 1 + 10


def test_a_step_s_exception_stops_the_loop(host):
    stream, count, told = _core.Stream(host), Counter(6, stop), []
    step = executable(host, count)
    with pytest.raises(Stop, match="enough"):
        _core.run_steps(step, stream, 1000, ahead=3, on_step=lambda done, _: told.append(done))
    assert told == [1, 2, 3, 4, 5]
    assert count.value == 6  # what was launched behind it was skipped
    stream.synchronize()  # reported already
    _core.run_steps(step, stream, 10)
    assert count.value == 16


def test_the_first_exception_is_the_one_raised(host):
    """The callback's comes first; the step's, launched ahead, follows while the loop waits for it."""
    stream, gate = _core.Stream(host), threading.Event()

    def act():
        gate.wait(LIMIT)
        raise KeyError("second")

    def on_step(done, _):
        if done == 3:
            gate.set()
            stop()

    with pytest.raises(Stop):
        _core.run_steps(executable(host, Counter(4, act)), stream, 1000, ahead=2, on_step=on_step)
    stream.synchronize()  # leaves nothing behind


def test_a_signal_stops_within_ahead(host):
    stream = _core.Stream(host)
    count = Counter(5, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        _core.run_steps(executable(host, count), stream, 100000, ahead=3)
    assert 5 <= count.value <= 5 + 3 - 1  # at most: the signal may be seen before the next launches
    stream.synchronize()


def test_ctrl_c():
    code = """
from volcast import _core
driver = _core.Driver.host()
stream = _core.Stream(driver)
count = []
graph = _core.HostGraph(driver, lambda: count.append(1))
step = _core.Executable(driver, [graph.handle])
def on_step(done, total):
    if done == 1:
        print("running", flush=True)
try:
    _core.run_steps(step, stream, 10**9, on_step=on_step)
    print("finished")
except KeyboardInterrupt:
    stopped = len(count)
    stream.synchronize()
    print("stopped", stopped == len(count))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "stopped True\n"


def test_two_loops_at_once(host):
    """Each loop's first step waits for the other's: neither holds Python's lock, or the other's stream."""
    barrier, counts = threading.Barrier(2, timeout=LIMIT), [Counter(), Counter()]
    for count in counts:
        count.at, count.act = 1, barrier.wait
    work = [(executable(host, count), _core.Stream(host), 50) for count in counts]
    threads = [threading.Thread(target=_core.run_steps, args=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [count.value for count in counts] == [50, 50]


class Previews:
    """A snapshot that copies a Counter's value, a preview that reads the copy, and what was shown of it."""

    def __init__(self, host, count, act=lambda: None):
        self.count, self.act, self.copy, self.read, self.shown = count, act, 0, 0, []
        self.stream = _core.Stream(host)
        self.snapshot, self.preview = executable(host, self.take), executable(host, self.decode)

    def take(self):
        self.copy = self.count.value

    def decode(self):
        copied = self.copy
        self.act()
        assert self.copy == copied  # no snapshot came in between
        self.read = copied

    def show(self, step):
        assert self.read == step
        self.shown.append(step)

    def options(self, every, on_preview=None):
        return {"snapshot": self.snapshot, "preview": self.preview, "preview_stream": self.stream,
                "every": every, "on_preview": on_preview or self.show}  # fmt: skip


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_previews_show_the_state_after_their_step(host, ahead):
    """Any that is shown is right and in order, and the first always is; the loop's result is the same."""
    count = Counter()
    previews = Previews(host, count)
    timing = _core.run_steps(
        executable(host, count), _core.Stream(host), 100, ahead=ahead, **previews.options(3)
    )
    assert count.value == 100
    assert previews.shown[0] == 3 and previews.shown == sorted(set(previews.shown))
    assert all(step % 3 == 0 for step in previews.shown)
    assert timing.launches == 100 + 2 * len(previews.shown)


def test_all_previews_are_shown_where_the_steps_are_slow(host):
    count = Counter()
    previews = Previews(host, count)

    def slow(done, total):
        previews.stream.synchronize()  # the preview is the faster one

    _core.run_steps(
        executable(host, count), _core.Stream(host), 21, ahead=1, on_step=slow, **previews.options(5)
    )
    assert previews.shown == [5, 10, 15, 20]


def test_a_slow_preview_does_not_stop_the_loop(host):
    """It ends only after all the steps: the others are skipped, and it is shown before the return."""
    count, gate = Counter(), threading.Event()
    previews = Previews(host, count, lambda: gate.wait(LIMIT))

    def on_step(done, total):
        if done == total:
            assert previews.shown == [] and not gate.is_set()
            gate.set()

    timing = _core.run_steps(
        executable(host, count), _core.Stream(host), 50, on_step=on_step, **previews.options(5)
    )
    assert previews.shown == [5]
    assert count.value == 50
    assert timing.launches == 52


def test_a_preview_of_the_last_step_is_awaited(host):
    count = Counter()
    previews = Previews(host, count)
    _core.run_steps(executable(host, count), _core.Stream(host), 4, **previews.options(4))
    assert previews.shown == [4]


@pytest.mark.parametrize("where", ["snapshot", "preview", "on_preview"])
def test_what_a_preview_raises_stops_the_loop(host, where):
    count = Counter()
    stream, previews = _core.Stream(host), Previews(host, count, stop if where == "preview" else lambda: None)
    step = executable(host, count)
    if where == "snapshot":
        previews.snapshot = executable(host, stop)
    with pytest.raises(Stop, match="enough"):
        _core.run_steps(step, stream, 10**9, **previews.options(2, stop if where == "on_preview" else None))
    stopped = count.value
    stream.synchronize()  # both are idle, and have nothing left to report
    previews.stream.synchronize()
    assert count.value == stopped and previews.shown == []
    _core.run_steps(step, stream, 3)
    assert count.value == stopped + 3


def test_cancelling_waits_for_the_preview(host):
    count, gate, ended = Counter(), threading.Event(), []
    previews = Previews(host, count, lambda: (gate.wait(LIMIT), ended.append(1)))

    def on_step(done, _):
        if done == 8:
            threading.Thread(target=gate.set).start()
            stop()

    with pytest.raises(Stop):
        _core.run_steps(
            executable(host, count), _core.Stream(host), 100, on_step=on_step, **previews.options(2)
        )
    assert ended == [1] and previews.shown == []


def test_input_guards(host):
    stream, step = _core.Stream(host), executable(host, lambda: None)
    previews = Previews(host, Counter())
    for arguments, message in [
        ({"steps": 0}, r"\[run_steps\] steps=0: need at least 1"),
        ({"steps": 3, "ahead": 0}, r"\[run_steps\] ahead=0: need at least 1"),
        ({"steps": 3, **previews.options(-1)}, r"\[run_steps\] every=-1: need at least 1, or 0"),
        ({"steps": 3, **previews.options(0)}, r"every=0: need every >= 1 with previews"),
        ({"steps": 3, "every": 2}, r"every=2: need snapshot, preview, preview_stream and on_preview"),
        ({"steps": 3, **previews.options(1), "on_preview": None}, r"every=1: need snapshot, preview"),
        (
            {"steps": 3, **previews.options(1), "preview_stream": stream},
            r"preview_stream is stream: previews",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            _core.run_steps(step, stream, **arguments)


def test_a_gpu_counts(device):
    """The loop with graphs that torch captured: the count after each preview's step, and at the end."""
    import torch

    if device.type != "cuda":
        pytest.skip("no GPU")
    driver = _core.Driver.cuda()
    stream, beside = _core.Stream(driver), _core.Stream(driver)
    count, copy, out = (torch.zeros(1 << 20, device=device) for _ in range(3))
    outside = torch.cuda.ExternalStream(stream.handle, device)
    work = [lambda: count.add_(1), lambda: copy.copy_(count), lambda: out.copy_(copy)]
    graphs = [torch.cuda.CUDAGraph(keep_graph=True) for _ in work]
    torch.cuda.synchronize()
    for graph, function in zip(graphs, work, strict=True):
        with torch.cuda.graph(graph, stream=outside):
            function()
    step, snapshot, preview = (_core.Executable(driver, [graph.raw_cuda_graph()]) for graph in graphs)
    twice = _core.Executable(driver, [graphs[0].raw_cuda_graph()], 2)
    shown = []
    torch.cuda.synchronize()
    _core.run_steps(
        step, stream, 40, snapshot=snapshot, preview=preview, preview_stream=beside, every=8,
        on_preview=lambda at: shown.append((at, float(out.max()), float(out.min()))),
    )  # fmt: skip
    assert shown and all(at == most == least for at, most, least in shown)
    twice.launch(stream)
    stream.synchronize()
    assert float(count.min()) == float(count.max()) == 42
