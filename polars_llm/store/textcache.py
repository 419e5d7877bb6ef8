"""A `diskcache.Cache` with its sharp edges off: text only, nothing deleted, every commit durable.

diskcache is unmaintained. What is done about it here:

- it unpickles what it finds (CVE-2025-69872: a planted row runs code): `_TextDisk` refuses all but text;
- by default it evicts, culls at a size limit and moves large values to files: all switched off;
- settings lie in the file, and the next opener may rewrite them: ours are imposed at every open, and
  what SQLite must know (synchronous FULL) on every connection, whatever the file says;
- opening rewrites all settings, so it waits for another's transaction: here only what differs;
- a connection survives a fork, which SQLite forbids: here one lives as long as one operation.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diskcache

from polars_llm.errors import CacheCorrupt, CacheError
from polars_llm.store import locks
from polars_llm.store.directory import os_errors, write_atomic

__all__ = ["TextCache", "busy", "file_identity", "open_text_cache", "sqlite_errors", "text_cache_exists"]

_FORMAT = b"1\n"
_SETTINGS = {
    "eviction_policy": "none",
    "cull_limit": 0,
    "size_limit": 2**62,
    "statistics": 0,
    "tag_index": 0,
    "sqlite_journal_mode": "wal",
    "sqlite_synchronous": 2,  # FULL: NORMAL may lose the last commits at power loss
    "sqlite_mmap_size": 0,  # a disk error under a mapped file kills the process
    "disk_min_file_size": 2**30,
}
_PLAIN = diskcache.core.MODE_RAW

# Connections as they were when this process was forked: never used, closed or freed in the child, which
# would disturb the parent's transaction. SQLite's own tables are stale for their files as well.
_open: set[tuple[Path, sqlite3.Connection]] = set()
_inherited: list[tuple[Path, sqlite3.Connection]] = []


def _keep_inherited() -> None:
    _inherited.extend(_open)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)


class _TextDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Text keys and text values, in the row itself; everything else is refused in both directions."""

    def put(self, key: Any) -> Any:
        if type(key) is not str:
            raise TypeError(f"a key of type {type(key).__name__}")
        return key, True

    def get(self, key: Any, raw: Any) -> Any:
        if not raw or type(key) is not str:
            raise _Foreign(f"a key that is not text: {key!r:.40}")
        return key

    def store(self, value: Any, read: Any, key: Any = diskcache.UNKNOWN) -> Any:
        if type(value) is not str or read:
            raise TypeError(f"a value of type {type(value).__name__} for {key!r}")
        return 0, _PLAIN, None, value

    def fetch(self, mode: Any, filename: Any, value: Any, read: Any) -> Any:
        if mode != _PLAIN or filename is not None or type(value) is not str or read:
            raise _Foreign("a value that is not text; it was not unpickled")
        return value


class _Foreign(Exception):
    """A row that this library did not write."""


class TextCache(diskcache.Cache):  # type: ignore[misc]  # diskcache has no types
    """Text under text, in one SQLite file. Use `open_text_cache`, which checks what is there."""

    def __init__(self, directory: Path, timeout: float) -> None:
        self._file = _file(directory)
        self._wait = timeout
        self._txn_id: int | None = None
        try:
            super().__init__(str(directory), timeout=timeout, disk=_TextDisk, **_SETTINGS)
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Start a transaction that excludes all other writers; `set` and `delete` join it."""
        # Not Cache.transact: that calls every error a timeout, a full disk included.
        self._sql("BEGIN IMMEDIATE")
        self._txn_id = threading.get_ident()

    def commit(self) -> None:
        """End the transaction; what was written is durable."""
        self._txn_id = None
        self._sql("COMMIT")

    def under(self, *prefixes: str) -> list[tuple[str, str]]:
        """Keys that start with one of the prefixes, with their values, as of one moment."""
        return self._read(*_starting(prefixes))

    def count_under(self, *prefixes: str) -> int:
        """How many keys start with one of the prefixes."""
        where, bounds = _starting(prefixes)
        ((found,),) = self._sql(f"SELECT COUNT(*) FROM Cache WHERE {where}", bounds)
        return int(found)

    def among(self, *keys: str) -> list[tuple[str, str]]:
        """Those of the keys that are there, with their values, as of one moment."""
        return self._read(f"key IN ({', '.join('?' * len(keys))})", keys)

    def _read(self, where: str, parameters: tuple[str, ...]) -> list[tuple[str, str]]:
        # One statement sees one state of the file; Cache.iterkeys and Cache.get would see several.
        rows = self._sql(f"SELECT key, raw, mode, filename, value FROM Cache WHERE {where}", parameters)
        disk = self._disk
        return [(disk.get(key, raw), disk.fetch(*value, False)) for key, raw, *value in rows]

    @property
    def _con(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "con", None)
        if connection is None:
            connection = _connect(self._file, self._wait)
            try:
                _impose(connection)
            except BaseException:
                _disconnect(self._file, connection)
                raise
            self._local.con = connection
        return connection

    def close(self) -> None:
        """Close the connection of this thread; an unfinished transaction is undone."""
        connection = getattr(self._local, "con", None)
        if connection is not None:
            self._txn_id = None if self._txn_id == threading.get_ident() else self._txn_id
            del self._local.con
            _disconnect(self._file, connection)

    @property
    def _sql_retry(self) -> Callable[..., Any]:
        # SQLite waits by itself; writing settings that are already so would make opening wait as well.
        sql = self._con.execute

        def execute(statement: str, parameters: tuple[Any, ...] = ()) -> Any:
            for start, needless in _NEEDLESS.items():
                if (
                    statement.startswith(start)
                    and sql(needless, parameters[: needless.count("?")]).fetchall()
                ):
                    return None
            return sql(statement, parameters)

        return execute


def _starting(prefixes: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """A condition of SQL, and its parameters."""
    bounds = [(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)) for prefix in prefixes]
    return " OR ".join(["key >= ? AND key < ?"] * len(prefixes)), tuple(itertools.chain(*bounds))


# What diskcache writes at every open, and how to see that it is so already; the parameters are the same.
_NEEDLESS = {
    "INSERT OR REPLACE INTO Settings": "SELECT 1 FROM Settings WHERE key = ? AND value = ?",
    "UPDATE Settings SET value = ? WHERE key": "SELECT 1 FROM Settings WHERE value = ? AND key = ?",
    "INSERT OR IGNORE INTO Settings": "SELECT 1 FROM Settings WHERE key = ?",
}


def _connect(file: Path, timeout: float) -> sqlite3.Connection:
    if any(file == inherited for inherited, _ in _inherited):
        raise CacheError(
            f"This process was forked from one that was just using {file}, so it cannot use it.",
            path=str(file),
            hint="start worker processes with the multiprocessing context 'spawn' or 'forkserver'."
            " Nothing was sent from here.",
        )
    # mode=rw: a file that vanished must not come back as an empty one.
    connection = sqlite3.connect(
        f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=timeout, isolation_level=None
    )
    _open.add((file, connection))
    return connection


def _disconnect(file: Path, connection: sqlite3.Connection) -> None:
    connection.close()
    _open.discard((file, connection))


def _impose(connection: sqlite3.Connection) -> None:
    """What diskcache reads from the file, which anybody may have written, is set here."""
    for pragma in ("synchronous = FULL", "mmap_size = 0", "trusted_schema = OFF", "cell_size_check = ON"):
        connection.execute(f"PRAGMA {pragma}")
    ((journal,),) = connection.execute("PRAGMA journal_mode")
    ((synchronous,),) = connection.execute("PRAGMA synchronous")
    # Opening asks for WAL; where that is not possible, SQLite keeps a rollback journal, as safe and slower.
    if synchronous != 2 or journal not in {"wal", "delete", "truncate", "persist"}:
        raise _Foreign(f"SQLite refuses durable commits: journal {journal}, synchronous {synchronous}")


def file_identity(directory: Path) -> tuple[int, int] | None:
    """Tells one database file from another that took its place."""
    try:
        found = _file(directory).stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def text_cache_exists(directory: Path) -> bool:
    """Was there ever a cache in this directory?"""
    return _format(directory).exists() or _file(directory).exists()


def open_text_cache(directory: Path, timeout: float) -> TextCache:
    """Open the cache, or make it where none ever was.

    Raises
    ------
    CacheCorrupt
        The file is missing although it was made once, truncated, or something else. It is never
        replaced by an empty one: the jobs in it would be paid for again.
    """
    with os_errors(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _format(directory).exists():
            return _create(directory, timeout)
        found = _format(directory).read_bytes()
    if found != _FORMAT:
        raise CacheError(
            f"{_format(directory)} says {found[:20]!r}; this version reads {_FORMAT!r}.",
            path=str(_format(directory)),
            hint="upgrade polars-llm-batch, or set POLARS_LLM_CACHE_DIR to another directory."
            " Nothing was sent.",
        )
    if not _has_content(_file(directory)):
        raise _corrupt(directory, "cache.db is missing or empty")
    if not {"Cache", "Settings"} <= _tables(directory, timeout).keys():
        raise _corrupt(directory, "cache.db has lost its tables")
    return TextCache(directory, timeout)


def _create(directory: Path, timeout: float) -> TextCache:
    deadline = time.monotonic() + timeout
    while True:
        with locks.try_hold(directory / ".creating.lock") as ours:
            if ours and not _format(directory).exists():
                _refuse_foreign(directory, timeout)
                # Made here for its mode. Opening the file later, other than by SQLite, would be wrong:
                # closing it again drops the locks that SQLite holds on it in this process.
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(_file(directory), os.O_CREAT | os.O_EXCL, 0o600))
                cache = TextCache(directory, timeout)
                write_atomic(_format(directory), lambda file: _write(file, _FORMAT))
                return cache
        if ours or _format(directory).exists():
            return open_text_cache(directory, timeout)
        if time.monotonic() > deadline:
            raise busy(directory, timeout)
        time.sleep(0.01)


def _refuse_foreign(directory: Path, timeout: float) -> None:
    """A file that is not the rest of an interrupted creation belongs to somebody else."""
    if not _has_content(_file(directory)):
        return
    tables = _tables(directory, timeout)
    if tables.keys() - {"Cache", "Settings"}:
        raise _corrupt(directory, "cache.db is another program's database")
    if tables.get("Cache"):
        raise _corrupt(directory, "cache.db is another program's cache")


def _tables(directory: Path, timeout: float) -> dict[str, bool]:
    """Name of each table, and whether it has rows. Changes nothing in the file."""
    connection = _connect(_file(directory), timeout)
    try:
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {name: name == "Cache" and _has_rows(connection) for (name,) in found}
    finally:
        _disconnect(_file(directory), connection)


def _has_rows(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT 1 FROM Cache LIMIT 1").fetchall())


def _write(file: Any, content: bytes) -> None:
    file.write(content)


def _file(directory: Path) -> Path:
    return directory / "cache.db"


def _format(directory: Path) -> Path:
    return directory / "format"


def _has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


@contextlib.contextmanager
def sqlite_errors(directory: Path, timeout: float) -> Iterator[None]:
    """Turn what SQLite and diskcache say about the cache in `directory` into CacheErrors with hints."""
    try:
        with os_errors(directory):
            yield
    except diskcache.Timeout as error:
        raise busy(directory, timeout) from error
    except _Foreign as error:
        raise _corrupt(directory, str(error)) from error
    except sqlite3.Error as error:
        found = _translate(error, directory, timeout)
        if found is None:
            raise
        raise found from error


_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_SCHEMA}
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
_SHUT = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH}


def _translate(error: sqlite3.Error, directory: Path, timeout: float) -> CacheError | None:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None and not isinstance(error, sqlite3.OperationalError):
        return None  # wrong use of the module: a bug here
    primary = None if code is None else code & 0xFF
    if primary in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return busy(directory, timeout)
    # Without a code: text that is not UTF-8.
    if primary is None or primary in _CORRUPT or code == sqlite3.SQLITE_IOERR_SHORT_READ:
        return _corrupt(directory, str(error))
    hint = "run the same line again."
    if primary in _FULL:
        hint = "free space on that disk, or check it; then run the same line again."
    elif primary in _SHUT:
        hint = (
            "make it writable for this user, or set POLARS_LLM_CACHE_DIR to a directory that can be written"
            " (and call pllm.recover(...) there first, or what was sent from here is paid again)."
        )
    return CacheError(
        f"The ledger {directory} cannot be used: {error}.",
        path=str(directory),
        hint=f"{hint} {_MONEY}",
    )


_MONEY = "Nothing is sent that is not in the ledger; a batch that exists is found again at the provider."


def busy(directory: Path, timeout: float) -> CacheError:
    """The error for waiting in vain."""
    return CacheError(
        f"Another process or thread has held the ledger {directory} for {timeout:g} s.",
        path=str(directory),
        hint="run the same line again; if it stays, look for a hanging process that uses this cache"
        f" directory. {_MONEY}",
    )


def _corrupt(directory: Path, what: str) -> CacheCorrupt:
    return CacheCorrupt(
        f"The ledger {directory} is damaged or not ours: {what}.",
        path=str(directory),
        hint="restore it from a backup; or move that directory away, and pllm.recover('openai') (or the"
        " provider you use) reads back what was paid for. Until then nothing is sent.",
    )
