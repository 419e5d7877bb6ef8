"""What each thread of this process is doing just now, asked without the risk of a dead lock.

Before Python 3.12 (and the last releases of 3.11) `sys._current_frames` may collect garbage while it holds a
lock of the interpreter. A finalizer then lets another thread run, and if that one begins or ends, each waits
for the other for ever (CPython gh-106883). Polars begins and ends threads with every query.
"""

from __future__ import annotations

import gc
import sys
import threading
from types import FrameType

__all__ = ["stacks"]

# Reentrant: a finalizer may ask as well.
_lock = threading.RLock()


def stacks() -> dict[int, FrameType]:
    """The innermost frame of each thread, by the thread's ident."""
    with _lock:  # or two threads would take each other's pause for the user's own setting
        collects = gc.isenabled()
        try:
            gc.disable()  # in here: a Ctrl+C that comes right behind it must not leave it at that
            return sys._current_frames()
        finally:
            if collects:
                gc.enable()
