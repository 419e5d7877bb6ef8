"""Looking at other threads' stacks."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest

from polars_llm.stacks import stacks

# Threads that begin and end, beside finalizers that let others run: with `sys._current_frames` itself it
# hangs on Python 3.11.7 within the first second.
_BUSY = """
import gc, sys, threading, time
from polars_llm.stacks import stacks

class Cycle:
    alive = 0

    def __init__(self):
        self.me = self
        Cycle.alive += 1

    def __del__(self):
        Cycle.alive -= 1
        time.sleep(0)

def begin():
    while not done.is_set():
        thread = threading.Thread(target=len, args=("",))
        thread.start()
        thread.join()

done = threading.Event()
gc.set_threshold(5, 1, 1)
threads = [threading.Thread(target=begin, daemon=True) for _ in range(4)]
for thread in threads:
    thread.start()
until = time.monotonic() + 3
looked = 0
while time.monotonic() < until:
    if Cycle.alive < 20:  # they are all that is collected, at the threads' allocations or at ours
        Cycle()
    assert threading.get_ident() in LOOK()
    looked += 1
done.set()
for thread in threads:
    thread.join()
assert gc.isenabled()
print(looked)
"""


def test_looking_never_waits_for_threads_that_begin() -> None:
    code = _BUSY.replace("LOOK", "stacks")
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(ended.stdout) > 100


def test_every_thread_is_there() -> None:
    there, leave = threading.Event(), threading.Event()

    def wait_here() -> None:
        there.set()
        leave.wait()

    thread = threading.Thread(target=wait_here)
    thread.start()
    there.wait()
    frames = []
    frame = stacks()[thread.ident or 0]
    while frame is not None:
        frames.append(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    leave.set()
    thread.join()
    assert "wait_here" in frames
    assert threading.get_ident() in stacks()


def test_the_users_setting_of_the_garbage_collector_stays() -> None:
    gc.disable()
    try:
        stacks()
        assert not gc.isenabled()
    finally:
        gc.enable()
    stacks()
    assert gc.isenabled()


def test_an_interrupt_leaves_garbage_collection_on(monkeypatch: pytest.MonkeyPatch) -> None:
    disable = gc.disable

    def interrupted() -> None:
        disable()
        raise KeyboardInterrupt  # Python looks for signals after each call

    monkeypatch.setattr(gc, "disable", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stacks()
    assert gc.isenabled()
