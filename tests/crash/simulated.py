"""Processes that are not: a user's process in a thread of its own, which stops and dies where it is told to.

A `Process` runs one call of the library after another, as a notebook does, and keeps what the library keeps
in memory. Only one of them is at work at any time; the others stand still at a durable write or at a
provider call, so that the same choices lead to the same course of events.

Dying is an exception that nothing catches, and from then on nothing is written or sent any more, whatever
is cleaned up on the way out; locks and databases are closed, as the system would do. To the disk and to the
provider that is a SIGKILL. The real ones are in `test_kill_everywhere`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars_llm as pllm
from polars_llm import store
from tests.crash.trace import Event, Omitted, Side, Tracer

__all__ = ["Doors", "Killed", "Process"]

_LONGEST = 60.0
# Nobody holds a transaction, or a lock that others wait for, around these.
_STOPS = ("send", "receive", "replace spool", "replace results", "unlink results")


class Killed(BaseException):
    """The process is dead."""


class Doors(Tracer):
    """The tracer of all simulated processes; it tells each of its own events only."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, self._tell)
        self._processes: dict[int, Process] = {}
        self._last: dict[int, socket.socket] = {}

    def _tell(self, side: Side, event: Event) -> None:
        process = self._processes.get(threading.get_ident())
        if process is not None:
            process.visit(side, event)

    @contextlib.contextmanager
    def watched(self, process: Process) -> Iterator[None]:
        """What this thread does is done by that process."""
        thread = threading.get_ident()
        self._processes[thread] = process
        try:
            yield
        finally:
            del self._processes[thread]
            self._last.pop(thread, None)

    def _send(self, name: str, real: Any, door: socket.socket, data: Any, *rest: Any) -> Any:
        self._last[threading.get_ident()] = door
        return super()._send(name, real, door, data, *rest)

    def _open(self, name: str, real: Any, *arguments: Any, **options: Any) -> int:
        return int(_closed_at_death(super()._open, name, real, os.close, *arguments, **options))

    def _open_file(self, name: str, real: Any, *arguments: Any, **options: Any) -> Any:
        return _closed_at_death(
            super()._open_file, name, real, lambda file: file.close(), *arguments, **options
        )

    def arrived(self) -> None:
        """Wait until what this thread has sent is with the provider: carried out, or thrown away as cut."""
        door = self._last.get(threading.get_ident())
        with contextlib.suppress(OSError, ValueError):
            if door is not None:
                door.shutdown(socket.SHUT_WR)
                select.select([door], [], [], _LONGEST)


def _closed_at_death(
    door: Callable[..., Any],
    name: str,
    real: Any,
    close: Callable[[Any], None],
    *arguments: Any,
    **options: Any,
) -> Any:
    """Open a file; who dies with it in the hand lets go of it."""
    opened = []

    def noted(*arguments: Any, **options: Any) -> Any:
        opened.append(real(*arguments, **options))
        return opened[-1]

    try:
        return door(name, noted, *arguments, **options)
    except Killed:
        for file in opened:
            close(file)
        raise


class Process:
    """One process: idle, standing still inside a call, or (only in between) at work.

    Parameters
    ----------
    doors
        Where its events come from.
    cache
        The cache directory, by a path that no other process uses: the library keeps one store a path.
    """

    def __init__(self, doors: Doors, cache: Path) -> None:
        self.cache = cache
        self._doors = doors
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._die_at: int | None = None
        self._stop_at: int | None = None
        self._moments = 0
        self._dead = False
        self._stands = False
        self._still = threading.Event()
        self._go = threading.Event()

    @property
    def stands(self) -> bool:
        """Is it inside a call?"""
        return self._thread is not None

    def begin(self, call: Callable[[], object], *, die_at: int | None, stop_at: int | None) -> None:
        """Start a call, and let it run until it ends, dies or stands still.

        Both numbers count moments: each event has one before and one after it. It stands still at the
        first moment from that number on at which it holds nothing that others wait for.
        """
        self._moments, self._dead = 0, False
        self._die_at, self._stop_at = die_at, stop_at
        self._error = None

        def run() -> None:
            try:
                with self._doors.watched(self):
                    call()
            except BaseException as error:  # noqa: BLE001  # raised again by whoever waits for it
                self._error = error
            finally:
                self._still.set()

        self._thread = threading.Thread(target=run, name=self.cache.name, daemon=True)
        pllm.Config(cache_dir=self.cache)
        self._thread.start()
        self._wait()

    def go_on(self, *, die: bool, stop_after: int | None = None) -> None:
        """Let it go on from where it stands, or die there."""
        pllm.Config(cache_dir=self.cache)
        self._die_at = self._moments if die else self._die_at
        self._stop_at = None if stop_after is None else self._moments + stop_after
        self._stands = False
        self._go.set()
        self._wait()

    def _wait(self) -> None:
        assert self._thread is not None
        assert self._still.wait(_LONGEST), f"{self.cache.name} hangs"
        self._still.clear()
        if self._stands:
            return
        self._thread.join(_LONGEST)
        assert not self._thread.is_alive(), f"{self.cache.name} hangs"
        self._thread = None
        if self._dead:
            self.forget()
        if self._error is not None:
            raise self._error

    def forget(self) -> None:
        """Another process takes its place: all that it knows is on the disk."""
        for name in [name for name, known in store._open.items() if known.directory.path == self.cache]:
            del store._open[name]

    # --- in the thread ---------------------------------------------------------------------------------

    def visit(self, side: Side, event: Event) -> None:
        """A moment of its life."""
        if self._dead:
            if event.name.startswith("close"):
                return
            raise Omitted if event.name.startswith(("unlink", "commit")) else Killed
        self._moments += 1
        self._stand_still(side, event)
        if self._die_at is not None and self._moments >= self._die_at:
            self._dead = True
            self._doors.arrived()
            raise Killed

    def _stand_still(self, side: Side, event: Event) -> None:
        if self._stop_at is None or self._moments < self._stop_at or not event.name.startswith(_STOPS):
            return
        if side == "after" and event.name.startswith("send"):
            return  # what is half sent has neither happened nor not happened
        self._stop_at = None
        self._stands = True
        self._still.set()
        self._go.wait()
        self._go.clear()
