"""The ledger: one small JSON record a job, transactional and durable, in a `diskcache.Cache`.

diskcache has sharp edges, and each is covered here: it unpickles what it finds (CVE-2025-69872), so the
Disk class refuses anything but text; it evicts by default; a size limit deletes in silence; its default
`synchronous` can lose a commit at power loss; settings are rewritten by the next opener.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol

import msgspec

from polars_llm.errors import CacheCorrupt, CacheError
from polars_llm.job import Job, State

__all__ = ["DiskcacheLedger", "Ledger"]

# Open jobs sort first, so that reading them never touches the closed ones.
_OPEN, _CLOSED, _FACT = "a/", "b/", "c/"
_LARGEST = 30_000


class Ledger(Protocol):
    """Jobs and small facts; what a method has returned from is durable."""

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """Exclude all other processes and threads; re-entrant. Waits, then raises CacheError."""

    def put(self, job: Job) -> None:
        """Store a new job, or replace its record."""

    def get(self, job_id: str) -> Job | None:
        """The job as it stands, None if there is none of that id."""

    def jobs(self, *, open_only: bool = False) -> list[Job]:
        """All jobs, oldest first."""

    def move(self, job: Job, state: State, **facts: Any) -> Job:
        """Compare and set: if the job still stands as `job` does, move it, else leave it.

        Returns it as it stands afterwards. Raises ValueError for an arrow that does not exist.
        """

    def get_fact(self, name: str) -> Any:
        """A small named value, None if unset."""

    def put_fact(self, name: str, value: Any) -> None:
        """Set a small named value."""

    def close(self) -> None:
        """Let go of the database; the next call opens it again."""


class DiskcacheLedger:
    """A ledger in a directory; nothing is opened before the first call.

    Parameters
    ----------
    directory
        Where the database lies.
    timeout
        Seconds to wait for another process' transaction.
    """

    def __init__(self, directory: Path, timeout: float = 60.0) -> None:
        self._directory = directory
        self._timeout = timeout
        self._cache: Any = None
        self._opening = threading.Lock()
        self._depth = threading.local()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Exclude all others; nested calls join the outer one."""
        if getattr(self._depth, "n", 0):
            yield
            return
        with self._errors(), self._open().transact(retry=False):
            self._depth.n = 1
            try:
                yield
            finally:
                self._depth.n = 0

    def put(self, job: Job) -> None:
        """Store a job under the prefix of its state."""
        text = msgspec.json.encode(job.to_dict()).decode()
        here, there = (_OPEN, _CLOSED) if job.state.is_open else (_CLOSED, _OPEN)
        with self.transaction():
            self._set(here + job.id, text)
            self._open().delete(there + job.id)

    def get(self, job_id: str) -> Job | None:
        """Look under both prefixes."""
        with self._errors():
            cache = self._open()
            # A job moves from open to closed, never back: in this order it cannot be missed.
            text = cache.get(_OPEN + job_id) or cache.get(_CLOSED + job_id)
        return None if text is None else self._job(text)

    def jobs(self, *, open_only: bool = False) -> list[Job]:
        """One pass over the keys in order."""
        wanted = (_OPEN,) if open_only else (_OPEN, _CLOSED)
        found: dict[str, Job] = {}
        if not self._directory.exists():
            return []
        with self._errors():
            cache = self._open()
            for key in cache.iterkeys():
                if not key.startswith(wanted):
                    break
                text = cache.get(key)
                if text is not None:
                    job = self._job(text)
                    found[job.id] = job
        return sorted(found.values(), key=lambda job: (job.created_at, job.id))

    def move(self, job: Job, state: State, **facts: Any) -> Job:
        """Compare and set by state and time of the last change."""
        with self.transaction():
            current = self.get(job.id)
            if current is None or (current.state, current.updated_at) != (job.state, job.updated_at):
                return current or job
            moved = job.to(state, **facts)
            self.put(moved)
            return moved

    def get_fact(self, name: str) -> Any:
        """A JSON value."""
        with self._errors():
            text = self._open().get(_FACT + name)
        return None if text is None else msgspec.json.decode(text)

    def put_fact(self, name: str, value: Any) -> None:
        """A JSON value."""
        with self.transaction():
            self._set(_FACT + name, msgspec.json.encode(value).decode())

    def close(self) -> None:
        """Close the connection of this thread."""
        with self._opening:
            if self._cache is not None:
                self._cache.close()
                self._cache = None

    def _set(self, key: str, text: str) -> None:
        if len(text.encode()) > _LARGEST:
            raise CacheError(
                f"The ledger record {key} has {len(text):,} characters; {_LARGEST:,} is the limit.",
                path=str(self._directory),
                hint="please report this. Nothing was sent.",
            )
        with self._errors():
            self._open().set(key, text, retry=False)

    def _job(self, text: str) -> Job:
        try:
            return Job.from_dict(msgspec.json.decode(text, type=dict[str, Any]))
        except (msgspec.DecodeError, TypeError, KeyError, ValueError) as error:
            self._corrupt(error)

    def _open(self) -> Any:
        with self._opening:
            if self._cache is None:
                self._cache = _open_cache(self._directory, self._timeout)
            return self._cache

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import diskcache

        try:
            yield
        except diskcache.Timeout as error:
            raise CacheError(
                f"Another process has held the ledger {self._directory} for {self._timeout:.0f} s.",
                path=str(self._directory),
                hint="run the same line again; if it stays, look for a hanging process that uses this"
                " cache directory. Nothing was sent.",
            ) from error
        except sqlite3.OperationalError as error:
            raise CacheError(
                f"The ledger {self._directory} cannot be used: {error}.",
                path=str(self._directory),
                hint="free space, make the directory writable, or set POLARS_LLM_CACHE_DIR to another"
                " one. What was sent is recorded and stays at the provider.",
            ) from error
        except (sqlite3.DatabaseError, _Foreign) as error:
            self._corrupt(error)

    def _corrupt(self, error: Exception) -> NoReturn:
        raise CacheCorrupt(
            f"The ledger {self._directory} is damaged or holds what this library did not write: {error}",
            path=str(self._directory),
            hint="move that directory away, then pllm.recover('openai') reads back from the provider"
            " what was sent. Until then nothing is sent, so nothing is paid twice.",
        ) from error


class _Foreign(Exception):
    """A row that is not plain text: it is never unpickled."""


def _open_cache(directory: Path, timeout: float) -> Any:
    import diskcache

    class TextDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
        """Text keys and text values; everything else is refused in both directions."""

        def put(self, key: Any) -> Any:
            if type(key) is not str:
                raise TypeError(f"a key of type {type(key).__name__}")
            return super().put(key)

        def get(self, key: Any, raw: Any) -> Any:
            if not raw or type(key) is not str:
                raise _Foreign("a key that is not text")
            return super().get(key, raw)

        def store(self, value: Any, read: Any, key: Any = diskcache.UNKNOWN) -> Any:
            if type(value) is not str or read:
                raise TypeError(f"a value of type {type(value).__name__}")
            return super().store(value, read, key=key)

        def fetch(self, mode: Any, filename: Any, value: Any, read: Any) -> Any:
            if mode != diskcache.core.MODE_RAW or type(value) is not str:
                raise _Foreign("a value that is not text")
            return super().fetch(mode, filename, value, read)

    settings = {
        "disk": TextDisk,
        "eviction_policy": "none",
        "cull_limit": 0,
        "size_limit": 2**62,
        "statistics": 0,
        "tag_index": 0,
        "sqlite_synchronous": 2,  # FULL: a commit survives power loss
        "disk_min_file_size": 2**30,  # records never become files of their own
    }
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"The cache directory {directory} cannot be made: {error.strerror}.",
            path=str(directory),
            hint="set POLARS_LLM_CACHE_DIR to a directory that can be written. Nothing was sent.",
        ) from error
    return diskcache.Cache(str(directory), timeout=timeout, **settings)
