"""Processes that end while samples of `submit` are under way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

START = """
import sys
from volcast.runtime.pipeline import load
model = load(sys.argv[1], engine="onnxruntime", threads=1)
futures = [model.submit(0, sample=sample, steps=1000) for sample in range(64)]
"""
QUEUE = """
import threading
from volcast.runtime.batching import Turns
from volcast.runtime.queueing import Queueing
begun = threading.Event()
def job(told):
    begun.set()
    while True:
        told(1, 2)
queue = Queueing(2)
for _ in range(2):
    queue.submit(job, Turns(), None).add_done_callback(lambda one: print(type(one.exception()).__name__))
begun.wait()
"""


def run_script(code: str, *given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *given], check=False, capture_output=True, text=True, timeout=120
    )


def test_a_script_ends_with_samples_under_way(gaussian: Path) -> None:
    ended = run_script(START, str(gaussian))
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_error_that_ends_a_script_is_told(gaussian: Path) -> None:
    ended = run_script(START + "raise OSError('mine')", str(gaussian))
    assert ended.returncode == 1
    assert ended.stderr.endswith("\nOSError: mine\n")


def test_a_queue_is_closed_at_exit() -> None:
    ended = run_script(QUEUE)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "CancelledError\n" * 2


def test_a_forked_child_closes_nothing_of_its_parent_s() -> None:
    fork = """
import os, sys
from volcast.runtime.exit import close_at_exit
class One:
    def close(self):
        os.write(1, b"closed\\n")
one = One()
close_at_exit(one)
if not (child := os.fork()):
    sys.exit(7)
os.write(1, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    ended = run_script(fork)
    assert (ended.returncode, ended.stdout) == (0, "7\nclosed\n")
