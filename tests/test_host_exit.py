"""csrc/host_*: how processes with live streams end, and what running out of memory looks like."""

import subprocess
import sys

import pytest

START = """
import sys, threading
from volcast import _core
driver = _core.Driver.host()
stream = _core.Stream(driver)
def launch(function, stream=stream, times=1):
    graph = _core.HostGraph(driver, function)
    work = _core.Executable(driver, [graph.handle])
    for _ in range(times):
        work.launch(stream)
    return work
"""
EXITS = {
    "idle": "",
    "cycle": "me = [stream]; me.append(me); del stream",
    "queue": "launch(lambda: None, times=100000)",
    "under way": """
begun = threading.Event()
launch(lambda: (begun.set(), threading.Event().wait(0.3), print("ended", flush=True)))
begun.wait()
""",
    "waits for another": """
gate, other, event = threading.Event(), _core.Stream(driver), _core.Event(driver)
launch(gate.wait, other)
other.record(event)
stream.wait(event)
launch(print)
gate.set()
""",
    "failed": "launch(lambda: 1 / 0)",
    "uncaught": "launch(lambda: 1 / 0); sys.excepthook = lambda *error: None; raise SystemExit(0)",
    "kept in the module": "sys.kept = [launch(lambda: None), stream, driver]",
    "destroyed by its own function": """
gate, ended, box = threading.Event(), threading.Event(), [stream]
work = launch(lambda: (gate.wait(), box.clear(), print("cleared", flush=True), ended.set()), stream)
launch.__defaults__ = None
del stream
gate.set()
ended.wait()
""",
    "used at exit": """
import atexit
def late():
    launch(lambda: print("late", flush=True))
    stream.synchronize()
atexit.register(late)
""",
    "a thread that is left waiting": """
gate = threading.Event()
launch(lambda: (gate.set(), threading.Event().wait(0.2)))
launch(print)
threading.Thread(target=threading.Event().wait, daemon=True).start()
gate.wait()
""",
}
PRINTED = {"under way": "ended\n", "used at exit": "late\n", "destroyed by its own function": "cleared\n"}


def run_script(code):
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("case", EXITS)
def test_the_process_ends_cleanly_with_a_live_stream(case):
    ended = run_script(START + EXITS[case])
    assert (ended.returncode, ended.stderr) == (0, "")
    if case in PRINTED:
        assert ended.stdout == PRINTED[case]


def test_after_python_s_exit_began_streams_are_closed():
    code = """
import atexit
def last():
    for use in (stream.synchronize, lambda: _core.Stream(driver)):
        try:
            use()
        except _core.DeviceError as error:
            print(error.name, "the process is exiting" in str(error))
atexit.register(last)
"""
    # Exit handlers run last first: this one is registered before the core's own.
    ended = run_script(code + START)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "CUDA_ERROR_DEINITIALIZED True\n" * 2


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_running_out_of_memory_is_told_by_name():
    code = """
import resource
now = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (now + (200 << 20), resource.RLIM_INFINITY))
streams = []
try:
    while len(streams) < 10000:
        streams.append(_core.Stream(driver))
except _core.DeviceError as error:
    print(error.code, error.name, error.lost, "smaller size or batch" in str(error))
print(len(streams) > 0)
"""
    ended = run_script(START + code)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "2 CUDA_ERROR_OUT_OF_MEMORY False True\nTrue\n"
