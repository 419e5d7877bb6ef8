"""Locks that die with their process: a lock file held open, never a pid or a time stamp.

The operating system drops them at exit and at SIGKILL. A forked child inherits the open file, and
with it the lock; it closes the file at once, so that the lock ends with its owner.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["hold", "is_held", "try_hold"]

_held: set[int] = set()
# Held while a descriptor is opened and noted, and across a fork: no child inherits one that it does
# not know of. Re-entrant, because a generator that the garbage collector closes may come in between.
_guard = threading.RLock()


def _close_in_child() -> None:
    # Closing does not unlock: the parent's descriptor still holds the same open file.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()
    _guard.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_close_in_child)


def _open(path: Path, flags: int) -> int:
    with _guard:
        # A symbolic link that somebody planted here must not make us create a file elsewhere.
        flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, flags, 0o600)
        _held.add(descriptor)
        return descriptor


def _lock(descriptor: int) -> bool:
    import filelock  # here and not above: `import polars_llm` stays quick

    return filelock.lock_descriptor(descriptor, blocking=False)


def _close(descriptor: int) -> None:
    with _guard:
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(path: Path) -> int | None:
    """A descriptor that holds the lock, None if somebody else does."""
    while True:
        descriptor = _open(path, os.O_RDWR | os.O_CREAT)
        got = False
        try:
            if not _lock(descriptor):
                return None
            # Its last holder may have removed the file after our open: that lock guards no name.
            got = _is_at(path, descriptor)
        finally:
            if not got:
                _close(descriptor)
        if got:
            return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(path: Path, descriptor: int) -> None:
    if sys.platform == "win32":  # an open file cannot be removed there
        _close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()
        return
    # Removed while still held, so that nobody's lock loses its name. A file that stays does no harm.
    try:
        with contextlib.suppress(OSError):
            if _is_at(path, descriptor):
                path.unlink()
    finally:
        _close(descriptor)  # also where Ctrl+C comes just now


@contextlib.contextmanager
def try_hold(path: Path) -> Iterator[bool]:
    """Hold the lock for the block, if nobody else does; says whether it does. The file goes at the end."""
    process = os.getpid()
    descriptor = _acquire(path)
    try:
        yield descriptor is not None
    finally:
        # A forked child that leaves the block has closed its copy already; the lock is its parent's.
        if descriptor is not None and os.getpid() == process:
            _release(path, descriptor)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold a lock on a file of one's own.

    Raises
    ------
    FileExistsError
        Somebody else holds it.
    """
    with try_hold(path) as got:
        if not got:
            raise FileExistsError(path)
        yield


def is_held(path: Path) -> bool:
    """Does anybody, in any process or thread, hold it? A missing file is held by nobody."""
    try:
        descriptor = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try_shared(descriptor)
    finally:
        _close(descriptor)


def _try_shared(descriptor: int) -> bool:
    if sys.platform == "win32":
        return _lock(descriptor)
    import fcntl

    # Shared, so that of two who ask at the same time neither takes the other for the owner.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
