"""csrc/host_*: order, overlap, failures and lifetimes of graphs whose nodes are Python functions."""

import gc
import os
import sys
import threading
import traceback

import pytest

from volcast import _core

LIMIT = 30  # seconds until a thread that should have come counts as lost


@pytest.fixture
def host():
    return _core.Driver.host()


def executable(driver, *functions, repeats=1):
    graphs = [_core.HostGraph(driver, function) for function in functions]
    return _core.Executable(driver, [graph.handle for graph in graphs], repeats)


def test_one_stream_keeps_the_order(host):
    stream, ran = _core.Stream(host), []
    work = [executable(host, lambda n=n: ran.append((n, threading.get_ident()))) for n in range(50)]
    for each in work:
        each.launch(stream)
    stream.synchronize()
    assert [n for n, _ in ran] == list(range(50))
    idents = {ident for _, ident in ran}
    assert len(idents) == 1 and threading.get_ident() not in idents


def test_an_executable_runs_its_graphs_in_order_and_repeats_them(host):
    stream, ran = _core.Stream(host), []
    whole = executable(host, lambda: ran.append("a"), lambda: ran.append("b"), repeats=3)
    whole.launch(stream)
    stream.synchronize()
    assert ran == ["a", "b"] * 3
    whole.launch(stream)
    whole.launch(stream)
    stream.synchronize()
    assert ran == ["a", "b"] * 9


def test_two_streams_run_at_once(host):
    barrier = threading.Barrier(2, timeout=LIMIT)  # breaks unless both stand in it
    meet = [executable(host, barrier.wait) for _ in range(2)]
    streams = [_core.Stream(host) for _ in range(2)]
    for each, stream in zip(meet, streams, strict=True):
        each.launch(stream)
    for stream in streams:
        stream.synchronize()


def test_one_executable_never_overlaps_itself(host):
    inside, seen = [0], []

    def work():
        inside[0] += 1
        seen.append(inside[0])
        threading.Event().wait(0.001)  # lets another thread in, if it can
        inside[0] -= 1

    both, streams = executable(host, work), [_core.Stream(host) for _ in range(2)]
    for _ in range(20):
        for stream in streams:
            both.launch(stream)
    for stream in streams:
        stream.synchronize()
    assert seen == [1] * 40


def test_a_stream_waits_for_another_s_event(host):
    one, two, event = _core.Stream(host), _core.Stream(host), _core.Event(host)
    gate, ran = threading.Event(), []
    first = executable(host, lambda: (gate.wait(LIMIT), ran.append("first")))
    second = executable(host, lambda: ran.append("second"))
    free = executable(host, lambda: ran.append("free"))
    first.launch(one)
    one.record(event)
    free.launch(two)
    two.wait(event)
    second.launch(two)
    assert not event.done()
    gate.set()
    two.synchronize()
    assert event.done()
    assert ran in (["free", "first", "second"], ["first", "free", "second"])


def test_an_event_means_its_last_record(host):
    stream, event = _core.Stream(host), _core.Event(host)
    gates = [threading.Event(), threading.Event()]
    work = [executable(host, lambda gate=gate: gate.wait(LIMIT)) for gate in gates]
    for each in work:
        each.launch(stream)
        stream.record(event)
    gates[0].set()
    assert not event.done()
    gates[1].set()
    event.synchronize()
    assert event.done()


def test_work_under_way_outlives_its_objects(host):
    stream, gate, ran = _core.Stream(host), threading.Event(), []
    hold, work = executable(host, lambda: gate.wait(LIMIT)), executable(host, lambda: ran.append(1))
    event = _core.Event(host)
    hold.launch(stream)
    work.launch(stream)
    stream.record(event)
    del hold, work, event
    gc.collect()
    threading.Thread(target=gate.set).start()
    del stream  # finishes its work first
    assert ran == [1]


def test_functions_are_let_go_of(host):
    class Held:
        alive = 0

        def __init__(self):
            Held.alive += 1

        def __del__(self):
            Held.alive -= 1

        def __call__(self):
            pass

    stream = _core.Stream(host)
    work = executable(host, Held(), repeats=5)
    work.launch(stream)
    stream.synchronize()
    assert Held.alive == 1
    del work
    del stream  # its thread may still hold the launch that it finished last
    assert Held.alive == 0


class Broken(Exception):
    pass


def breaks():
    raise Broken("in the graph")


def test_a_failure_skips_what_follows_and_is_raised_once(host):
    stream, event, ran = _core.Stream(host), _core.Event(host), []
    work, failing = executable(host, lambda: ran.append(1)), executable(host, breaks)
    work.launch(stream)
    failing.launch(stream)
    work.launch(stream)
    stream.record(event)
    work.launch(stream)
    with pytest.raises(Broken, match="in the graph") as raised:
        stream.synchronize()
    assert "breaks" in {frame.name for frame in traceback.extract_tb(raised.value.__traceback__)}
    assert ran == [1]
    event.synchronize()
    stream.synchronize()
    assert event.done()
    work.launch(stream)
    stream.synchronize()
    assert ran == [1, 1]


@pytest.mark.parametrize("ask", ["synchronize", "done"])
def test_an_event_reports_the_failure_before_it(host, ask):
    stream, before, behind, ran = _core.Stream(host), _core.Event(host), _core.Event(host), []
    gate = threading.Event()
    hold, late = executable(host, lambda: gate.wait(LIMIT)), executable(host, lambda: ran.append(1))
    stream.record(before)
    executable(host, breaks).launch(stream)
    stream.record(behind)
    hold.launch(stream)
    late.launch(stream)  # enqueued before the report: skipped, however long it takes
    before.synchronize()
    with pytest.raises(Broken):
        if ask == "synchronize":
            behind.synchronize()
        while True:
            behind.done()
    gate.set()
    stream.synchronize()
    assert ran == []


def test_a_stream_that_waits_for_failed_work_fails_too(host):
    one, two, event, ran = _core.Stream(host), _core.Stream(host), _core.Event(host), []
    work = executable(host, lambda: ran.append(1))
    executable(host, breaks).launch(one)
    one.record(event)
    two.wait(event)
    work.launch(two)
    raised = []
    for stream in (one, two):
        with pytest.raises(Broken) as error:
            stream.synchronize()
        raised.append(error.value)
    assert raised[0] is raised[1] and ran == []
    for stream in (one, two):
        work.launch(stream)
        stream.synchronize()
    assert ran == [1, 1]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, MemoryError, StopIteration])
def test_the_exception_itself_arrives(host, kind):
    original, stream = kind("x"), _core.Stream(host)

    def fail():
        raise original

    executable(host, fail).launch(stream)
    with pytest.raises(kind) as raised:
        stream.synchronize()
    assert raised.value is original


def test_an_unreported_failure_is_let_go_of(host):
    stream = _core.Stream(host)
    executable(host, breaks).launch(stream)
    del stream


def test_other_threads_run_during_synchronize(host):
    stream, event = _core.Stream(host), _core.Event(host)
    for wait in (stream.synchronize, event.synchronize):
        begun, gate = threading.Event(), threading.Event()
        opened = []

        def hold(begun=begun, gate=gate, opened=opened):
            begun.set()
            opened.append(gate.wait(LIMIT))

        def opens(begun=begun, gate=gate):
            begun.wait(LIMIT)
            gate.set()

        helper = threading.Thread(target=opens)
        executable(host, hold).launch(stream)
        stream.record(event)
        helper.start()
        wait()
        helper.join()
        assert opened == [True]


@pytest.mark.skipif(sys.platform != "linux", reason="counts /proc/self/task")
def test_streams_leave_no_threads_behind(host):
    # By id: threads of earlier tests may end meanwhile.
    before = set(os.listdir("/proc/self/task"))

    def added():
        return len(set(os.listdir("/proc/self/task")) - before)

    streams = [_core.Stream(host) for _ in range(8)]
    assert added() >= 8
    del streams
    work = executable(host, lambda: None)
    for _ in range(200):
        stream = _core.Stream(host)
        work.launch(stream)
    del stream
    assert added() < 8


def test_a_graph_must_live_until_it_is_part_of_an_executable(host):
    graph = _core.HostGraph(host, print)
    handle = graph.handle
    del graph
    with pytest.raises(
        _core.DeviceError, match=r"\[host\] add a graph to a graph: CUDA_ERROR_INVALID_VALUE"
    ) as raised:
        _core.Executable(host, [handle])
    assert (raised.value.code, raised.value.name, raised.value.lost) == (1, "CUDA_ERROR_INVALID_VALUE", False)


def test_executables_need_graphs(host):
    graph = _core.HostGraph(host, print)
    with pytest.raises(ValueError, match=r"\[Executable\] graph_handles: need at least one graph"):
        _core.Executable(host, [])
    with pytest.raises(ValueError, match=r"\[Executable\] repeats=0: need at least 1"):
        _core.Executable(host, [graph.handle], 0)
