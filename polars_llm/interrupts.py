"""Stopping a thread that waits where Ctrl+C does not reach it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

__all__ = ["check", "pause", "stopped_by"]


class _Here(threading.local):
    stop: threading.Event | None = None


_here = _Here()


@contextlib.contextmanager
def stopped_by(stop: threading.Event) -> Iterator[None]:
    """Within, waiting on this thread ends as by Ctrl+C as soon as the event is set."""
    before, _here.stop = _here.stop, stop
    try:
        yield
    finally:
        _here.stop = before


def check() -> None:
    """Raise KeyboardInterrupt if this thread is to stop."""
    if _here.stop is not None and _here.stop.is_set():
        raise KeyboardInterrupt


def pause(seconds: float) -> None:
    """Sleep; KeyboardInterrupt as soon as this thread is to stop."""
    if _here.stop is None:
        time.sleep(seconds)
    else:
        _here.stop.wait(seconds)
        check()
