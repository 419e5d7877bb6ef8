"""The ledger: one small JSON record a job, transactional and durable."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from polars_llm.errors import CacheCorrupt, CacheError
from polars_llm.job import Job, State

if TYPE_CHECKING:
    from polars_llm.store.textcache import TextCache

__all__ = ["DiskcacheLedger", "Ledger"]

# Open jobs lie together, so that reading them does not touch the closed ones.
_OPEN, _CLOSED, _FACT = "open/", "closed/", "fact/"
# One row for each time that a closed job was opened again, or that answers came without one.
_AGAIN = "again/"
_LARGEST = 32 * 1024


class Ledger(Protocol):
    """Jobs and small facts; what a method has returned from is durable.

    All of it is safe between threads and processes. Every method may raise CacheError, and CacheCorrupt
    where the records cannot be trusted.
    """

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """Exclude all other writers, of this process and of others, for the block.

        What the block writes is seen by others, and durable, when it ends; an exception undoes it.
        Re-entrant within a thread. Reading goes on meanwhile and sees the state before.
        """

    def in_transaction(self) -> bool:
        """Is this thread inside of one, so that what it writes is not durable yet?"""

    def put(self, job: Job) -> None:
        """Store a new job, or replace its record."""

    def get(self, job_id: str) -> Job | None:
        """The job as it stands, None if there is none of that id."""

    def jobs(self, *, open_only: bool = False) -> list[Job]:
        """All jobs of one moment, by created_at, then id."""

    def count(self) -> int:
        """How often a job was opened: each new one makes it more, one that is opened again, and `counted`.

        None is ever removed: where it is what it was, nobody has claimed anything since.
        """

    def counted(self, job_id: str) -> None:
        """Answers of that job came without its being open (`recover`): look-ups from before do not hold."""

    def move(self, job: Job, state: State, **facts: Any) -> Job:
        """Compare and set: store ``job.to(state, **facts)`` if nobody has changed the job meanwhile.

        Nobody has if the stored record equals `job` in every fact. Of two who move the same job from
        the same record exactly one wins, also where the state stays the same.

        Returns
        -------
        Job
            The job as it stands afterwards: moved, or as somebody else has left it.

        Raises
        ------
        ValueError
            There is no such transition.
        CacheError
            The ledger does not know the job: somebody removed the directory.
        """

    def get_fact(self, name: str) -> Any:
        """A small named JSON value, None if unset."""

    def put_fact(self, name: str, value: Any) -> None:
        """Set a small named JSON value."""

    def close(self) -> None:
        """Let go of the database; the next call opens it again."""


class DiskcacheLedger:
    """A ledger in a directory of its own; nothing is opened or made before the first call.

    Parameters
    ----------
    directory
        Where the database lies.
    timeout
        Seconds to wait for another's transaction.
    """

    def __init__(self, directory: Path, timeout: float = 60.0) -> None:
        self._directory = Path(directory)
        self._timeout = timeout
        self._process = _Process()

    def __repr__(self) -> str:
        return f"DiskcacheLedger({str(self._directory)!r})"

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Exclude all other writers for the block; see `Ledger.transaction`."""
        here = self._here()
        if here.local.writing:
            yield
            return
        # Threads of one process queue here; SQLite's own waiting is for other processes.
        if not here.turn.acquire(timeout=self._timeout):
            raise self._waited()
        try:
            with self._session() as cache:
                with self._errors():
                    cache.begin()
                here.local.writing = True
                try:
                    yield
                except BaseException:
                    here.local.writing = False
                    cache.close()  # which undoes it
                    raise
                here.local.writing = False
                with self._errors():
                    cache.commit()
        finally:
            here.local.writing = False
            here.turn.release()

    def in_transaction(self) -> bool:
        """Is this thread inside of one?"""
        return self._here().local.writing

    def put(self, job: Job) -> None:
        """Store a new job, or replace its record."""
        name, other = (_OPEN, _CLOSED) if job.state.is_open else (_CLOSED, _OPEN)
        text = _encode(job.to_dict(), job.id)
        with self.transaction(), self._session() as cache, self._errors():
            cache.set(name + job.id, text)
            if cache.delete(other + job.id) and job.state.is_open:
                self.counted(job.id)

    def get(self, job_id: str) -> Job | None:
        """The job as it stands, None if there is none of that id."""
        found = self._read("among", _OPEN + job_id, _CLOSED + job_id)
        return self._job(*found[0]) if found else None

    def jobs(self, *, open_only: bool = False) -> list[Job]:
        """All jobs of one moment, by created_at, then id."""
        prefixes = (_OPEN,) if open_only else (_OPEN, _CLOSED)
        found = [self._job(key, text) for key, text in self._read("under", *prefixes)]
        return sorted(found, key=lambda job: (job.created_at, job.id))

    def count(self) -> int:
        """How often a job was opened; see `Ledger.count`."""
        if not self._exists():
            return 0
        with self._session() as cache, self._errors():
            return cache.count_under(_OPEN, _CLOSED, _AGAIN)

    def counted(self, job_id: str) -> None:
        """Makes `count` more; see `Ledger.counted`."""
        with self.transaction(), self._session() as cache, self._errors():
            cache.set(f"{_AGAIN}{job_id}/{secrets.token_hex(8)}", "")

    def move(self, job: Job, state: State, **facts: Any) -> Job:
        """Compare and set; see `Ledger.move`."""
        moved = job.to(state, **facts)
        with self.transaction():
            stands = self.get(job.id)
            if stands is None:
                raise self._unknown(job)
            if stands != job:
                return stands
            # A clock that stands still or goes back must not make two records look the same.
            if moved.updated_at <= stands.updated_at:
                later = math.nextafter(stands.updated_at, math.inf)
                moved = dataclasses.replace(moved, updated_at=later)
            self.put(moved)
            return moved

    def get_fact(self, name: str) -> Any:
        """A small named JSON value, None if unset."""
        found = self._read("among", _FACT + name)
        return self._decode(*found[0]) if found else None

    def put_fact(self, name: str, value: Any) -> None:
        """Set a small named JSON value."""
        text = _encode(value, name)
        with self.transaction(), self._session() as cache, self._errors():
            cache.set(_FACT + name, text)

    def close(self) -> None:
        """Let go of the database; the next call opens it again."""
        self._here().cache = None

    def _here(self) -> _Process:
        if self._process.pid != os.getpid():
            self._process = _Process()  # a forked child starts anew
        return self._process

    @contextlib.contextmanager
    def _session(self) -> Iterator[TextCache]:
        """The cache, with a connection for the block: none outlives an operation, so none gets forked."""
        here = self._here()
        if here.local.cache is not None:
            yield here.local.cache
            return
        with self._errors():
            cache = self._opened(here)
        here.local.cache = cache
        try:
            yield cache
        finally:
            here.local.cache = None
            cache.close()

    def _opened(self, here: _Process) -> TextCache:
        from polars_llm.store.textcache import file_identity, open_text_cache

        with here.opening:
            # Removed, or put back from a backup, while this process lives: what we know is void.
            if here.cache is None or here.identity != file_identity(self._directory):
                here.cache = open_text_cache(self._directory, self._timeout)
                here.identity = file_identity(self._directory)
            return here.cache

    def _exists(self) -> bool:
        from polars_llm.store.textcache import text_cache_exists

        with self._errors():
            return text_cache_exists(self._directory)

    def _read(self, how: str, *names: str) -> list[tuple[str, str]]:
        if not self._exists():
            return []  # reading makes nothing
        with self._session() as cache, self._errors():
            found: list[tuple[str, str]] = cache.under(*names) if how == "under" else cache.among(*names)
            return found

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        from polars_llm.store.textcache import sqlite_errors

        return sqlite_errors(self._directory, self._timeout)

    def _job(self, key: str, text: str) -> Job:
        try:
            job = Job.from_dict(self._decode(key, text))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(key, str(error)) from error
        if key != (_OPEN if job.state.is_open else _CLOSED) + job.id:
            raise self._damaged(key, f"it is the record of {job.id}, {job.state}")
        return job

    def _decode(self, key: str, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise self._damaged(key, str(error)) from error

    def _damaged(self, key: str, what: str) -> CacheCorrupt:
        return CacheCorrupt(
            f"The record {key!r} in the ledger {self._directory} is damaged, or a newer version wrote it:"
            f" {what}.",
            path=str(self._directory),
            hint="upgrade polars-llm-batch, or restore the ledger from a backup. Until then nothing is"
            " sent, so nothing is paid twice.",
        )

    def _unknown(self, job: Job) -> CacheError:
        return CacheError(
            f"{job.id} is no longer in the ledger {self._directory}; was the cache directory removed?",
            path=str(self._directory),
            hint=f"pllm.recover({job.provider!r}) reads back what was sent and paid for.",
        )

    def _waited(self) -> CacheError:
        from polars_llm.store.textcache import busy

        return busy(self._directory, self._timeout)


class _Process:
    """What belongs to one process and must not be used by its forked children."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.turn = threading.RLock()
        self.opening = threading.RLock()  # a signal's handler may ask for the jobs
        self.local = _Thread()
        self.cache: TextCache | None = None
        self.identity: tuple[int, int] | None = None


class _Thread(threading.local):
    """Whether this thread is inside an operation, and inside a transaction."""

    cache: TextCache | None = None
    writing = False


def _encode(value: Any, name: str) -> str:
    # ASCII, so that any str fits, lone surrogates of a garbled error message included.
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    if len(text) > _LARGEST:
        raise CacheError(
            f"The record of {name} has {len(text):,} bytes; the ledger takes {_LARGEST:,}.",
            path=name,
            hint="please report this with the text of its longest field. Nothing was sent for it.",
        )
    return text
