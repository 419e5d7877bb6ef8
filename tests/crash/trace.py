"""Every durable write and every provider call of this process, seen from below the library.

What a crash can leave half done goes through few doors: files are opened, flushed, renamed and removed
by functions of `os` and `io`, SQLite commits, and requests leave by a socket. A `Tracer` stands at those
doors; it knows nothing of the library, so what is added there is seen here without anybody's help. What
doesn't come through them (a file that compiled code writes by itself) shows as a file that nobody opened.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import io
import os
import re
import select
import socket
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

__all__ = ["Event", "Omitted", "Side", "Tracer", "Visitor"]

Side: TypeAlias = Literal["before", "after"]

_PACKAGE = f"{os.sep}polars_llm{os.sep}"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Statements that change the file by themselves, where no transaction is open.
_CHANGES = re.compile(
    r"\s*(COMMIT|(CREATE|DROP|ALTER)( UNIQUE)? \w+|INSERT|REPLACE|UPDATE|DELETE|VACUUM|PRAGMA \w+ *=)", re.I
)
# Made by SQLite, beside a database that was opened through `sqlite3.connect`.
_SQLITES_OWN = re.compile(r".*\.db(-wal|-shm|-journal)?")


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One durable write or provider call.

    Parameters
    ----------
    name
        What, with all that differs from run to run left out: ``replace spool/*.keys.arrow``.
    place
        From where: the functions of the library on the stack, with their lines.
    idle
        Nothing was written after all; known afterwards only.
    """

    name: str
    place: str
    idle: bool = False


Visitor: TypeAlias = Callable[[Side, Event], None]


class Omitted(Exception):
    """Raised by a visitor before an event that is not to happen, as if it had."""


class Tracer:
    """Calls `visit` on both sides of everything durable under `root`, and of every send and reply.

    Parameters
    ----------
    root
        The cache directory; other files are nobody's business.
    visit
        Called with the side and the event. What it raises takes the place of the event.
    one_thread
        Look at the thread only that installs it: for a test's process, in which others are at work.
    """

    def __init__(self, root: Path, visit: Visitor, *, one_thread: bool = False) -> None:
        self._root = os.path.realpath(root)
        self._visit = visit
        self._thread = threading.get_ident() if one_thread else None
        self._files: dict[int, str] = {}
        self._calls: dict[int, list[str]] = {}
        self._opened = self._found()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Stand at the doors for the block."""
        doors: list[tuple[Any, str, Callable[..., Any]]] = [
            (os, "open", self._open),
            (io, "open", self._open_file),
            (builtins, "open", self._open_file),
            *((os, name, self._flush) for name in ("fsync", "fdatasync", "ftruncate")),
            *((os, name, self._rename) for name in ("replace", "rename", "link", "symlink")),
            *((os, name, self._remove) for name in ("unlink", "remove", "rmdir", "truncate")),
            (os, "mkdir", self._make_directory),
            (sqlite3, "connect", self._connect),
            *((socket.socket, name, self._send) for name in ("send", "sendall")),
            *((socket.socket, name, self._receive) for name in ("recv", "recv_into")),
        ]
        kept = [(home, name, getattr(home, name)) for home, name, _ in doors if hasattr(home, name)]
        try:
            for (home, name, real), (_, _, door) in zip(kept, doors, strict=True):
                setattr(home, name, self._at(door, name, real))
            yield
        finally:
            for home, name, real in kept:
                setattr(home, name, real)

    def untraced(self) -> set[str]:
        """Kinds of files under `root` that came through none of the doors."""
        return {kind for kind in self._found() - self._opened if not _SQLITES_OWN.fullmatch(kind)}

    def _found(self) -> set[str]:
        return {str(self._kind(path)) for path in Path(self._root).rglob("*") if not path.is_dir()}

    def _at(self, door: Callable[..., Any], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def pass_through(*args: Any, **options: Any) -> Any:
            if self._thread not in (None, threading.get_ident()):
                return real(*args, **options)
            return door(name, real, *args, **options)

        return pass_through

    def _event(self, name: str, call: Callable[[], Any], database: str | None = None) -> Any:
        event = Event(name, _place())
        try:
            self._visit("before", event)
        except Omitted:
            return None
        before = database and self._stamp(database)
        result = call()
        idle = bool(database) and self._stamp(str(database)) == before
        self._visit("after", dataclasses.replace(event, idle=idle))
        return result

    # --- files -----------------------------------------------------------------------------------------

    def _kind(self, path: Any) -> str | None:
        """The path under `root`, without what is random in it; None for other files."""
        try:
            text = os.path.abspath(os.fsdecode(path))
        except TypeError:
            return None
        home, name = os.path.split(text)
        text = os.path.join(os.path.realpath(home), name)
        if text != self._root and not text.startswith(self._root + os.sep):
            return None
        short = os.path.relpath(text, self._root).replace(os.sep, "/")
        return re.sub(r"(?<=[-_./])[0-9a-f]{8,}(-[0-9a-f]{8})*|[a-z0-9_]{8}(?=\.tmp$)", "*", short)

    def _open(self, name: str, real: Any, path: Any, flags: int, *rest: Any, **options: Any) -> int:
        kind = self._kind(path) if not isinstance(path, int) else None
        if kind is None:
            return int(real(path, flags, *rest, **options))
        if not flags & _WRITES or (os.path.exists(path) and not flags & os.O_TRUNC):
            descriptor = real(path, flags, *rest, **options)
        else:
            self._opened.add(kind)
            descriptor = self._event(f"create {kind}", lambda: real(path, flags, *rest, **options))
        self._files[descriptor] = kind
        return int(descriptor)

    def _open_file(self, name: str, real: Any, file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        kind = self._kind(file) if not isinstance(file, int) else None
        if kind is None or not set(mode) & set("wax+"):
            return real(file, mode, *rest, **options)
        self._opened.add(kind)
        opened = self._event(f"write {kind}", lambda: real(file, mode, *rest, **options))
        self._files[opened.fileno()] = kind
        return opened

    def _flush(self, name: str, real: Any, descriptor: Any, *rest: Any) -> Any:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        return self._event(f"{name} {self._files.get(number, '?')}", lambda: real(descriptor, *rest))

    def _rename(self, name: str, real: Any, source: Any, target: Any, **options: Any) -> Any:
        kind = self._kind(target)
        if kind is None and self._kind(source) is None:
            return real(source, target, **options)
        self._opened.add(str(kind))
        return self._event(f"{name} {kind}", lambda: real(source, target, **options))

    def _remove(self, name: str, real: Any, path: Any, *rest: Any, **options: Any) -> Any:
        kind = self._kind(path)
        if kind is None or not os.path.lexists(path):
            return real(path, *rest, **options)
        return self._event(f"{name} {kind}", lambda: real(path, *rest, **options))

    def _make_directory(self, name: str, real: Any, path: Any, *rest: Any, **options: Any) -> Any:
        kind = self._kind(path)
        if kind is None or os.path.isdir(path):
            return real(path, *rest, **options)
        return self._event(f"{name} {kind}", lambda: real(path, *rest, **options))

    # --- SQLite ----------------------------------------------------------------------------------------

    def _connect(self, name: str, real: Any, database: Any, *rest: Any, **options: Any) -> Any:
        path = str(database).removeprefix("file://").partition("?")[0]
        kind = self._kind(path)
        if kind is None:
            return real(database, *rest, **options)
        return real(database, *rest, **{**options, "factory": self._connection(kind)})

    def _connection(self, kind: str) -> type[sqlite3.Connection]:
        tracer = self

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *parameters: Any) -> Any:
                change = _CHANGES.match(sql)
                if change is None or (self.in_transaction and change[1].upper() != "COMMIT"):
                    return super().execute(sql, *parameters)
                said = " ".join(change[1].lower().split()).rstrip(" =")
                made: list[sqlite3.Cursor] = []
                run = super().execute
                try:
                    tracer._event(f"{said} in {kind}", lambda: made.append(run(sql, *parameters)), kind)
                except BaseException:
                    for cursor in made:
                        cursor.close()  # an open statement of one who only plays dead locks others out
                    raise
                return made[0] if made else None

            def commit(self) -> None:
                tracer._event(f"commit in {kind}", super().commit, kind)

            def close(self) -> None:
                # The last one that closes writes the log back into the file.
                try:
                    tracer._event(f"close {kind}", super().close, kind)
                except BaseException:
                    super().close()  # whoever only plays dead leaves no file open
                    raise

        return Connection

    def _stamp(self, kind: str) -> list[tuple[int, int]]:
        """Tells whether SQLite has written: the state of a database and of its log."""
        files = [os.path.join(self._root, kind + end) for end in ("", "-wal", "-journal")]
        states = [os.stat(file) for file in files if os.path.exists(file)]
        return [(state.st_size, state.st_mtime_ns) for state in states if state.st_size]

    # --- the provider ----------------------------------------------------------------------------------

    def _send(self, name: str, real: Any, door: socket.socket, data: Any, *rest: Any) -> Any:
        line = re.match(rb"([A-Z]+) (\S+) HTTP/1\.[01]\r\n", bytes(data[:2000]))
        if line is not None:
            path = re.sub(r"(batch|file|msgbatch)[-_][^/]+", r"\1_*", line[2].decode().partition("?")[0])
            # What is asked, and whether the reply has begun.
            self._calls[id(door)] = [f"{line[1].decode()} {path}", ""]
        if id(door) not in self._calls:
            return real(door, data, *rest)
        what = "send" if line is not None else "send the body of"
        return self._event(f"{what} {self._calls[id(door)][0]}", lambda: real(door, data, *rest))

    def _receive(self, name: str, real: Any, door: socket.socket, *rest: Any) -> Any:
        call = self._calls.get(id(door))
        if call is None or call[1]:
            return real(door, *rest)
        call[1] = "begun"
        # So that a crash before the reply is one after the provider has done its part.
        select.select([door], [], [], door.gettimeout())
        return self._event(f"receive {call[0]}", lambda: real(door, *rest))


def _place() -> str:
    """The library's functions on the stack, outermost first."""
    frame, found = sys._getframe(2), []
    while frame is not None:
        code = frame.f_code
        if _PACKAGE in code.co_filename:
            file = code.co_filename.rpartition(_PACKAGE)[2]
            found.append(f"{file}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]  # None above the outermost
    return " > ".join(reversed(found))
