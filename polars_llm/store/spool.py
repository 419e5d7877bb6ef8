"""The working files of a job: its keys, its request file, its downloads. Gone when it is done."""

from __future__ import annotations

import hashlib
import itertools
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, BinaryIO, Self

import polars as pl

from polars_llm.errors import CacheCorrupt
from polars_llm.store.directory import os_errors, write_atomic

__all__ = ["Scratch", "Spool"]

_KEYS: dict[str, pl.DataType] = {"key": pl.Binary(), "attempt": pl.UInt16()}
_KEY_BYTES = 32
# Polars aborts the process on some damaged Arrow files, so nothing unproven is handed to it.
_MAGIC = b"polars_llm keys 1 "
_HEAD_BYTES = len(_MAGIC) + 32 + 1
_IDLE = 3600.0


class Spool:
    """Files named after their job, all in one directory.

    Parameters
    ----------
    directory
        Where they lie; it is made when the first is written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = Path(directory)
        # By job. Without a lock: a thread of Polars that waits for part of a query runs other work meanwhile,
        # such as a verb that asks for these as well, and would wait for itself.
        self._prefixes: dict[str, pl.DataFrame] = {}

    def write_keys(self, job_id: str, keys: pl.DataFrame) -> None:
        """Store what the job is made of; durable on return, and never changed afterwards.

        Parameters
        ----------
        job_id
            The job.
        keys
            Columns ``key`` (32 bytes each) and ``attempt``, in the order of the request file's lines.
        """
        frame = keys.select(pl.col(name).cast(dtype) for name, dtype in _KEYS.items())
        if not _are_keys(frame):
            raise ValueError(f"{job_id}: every key has {_KEY_BYTES} bytes and an attempt")
        arrow = BytesIO()
        frame.write_ipc(arrow)
        content = arrow.getbuffer()

        def write(file: BinaryIO) -> None:
            file.write(_head(content))
            file.write(content)

        self._write(self._path(job_id, "keys.arrow"), write)
        self._prefixes[job_id] = _prefixes(frame.with_columns(job_id=pl.lit(job_id)))

    def has_keys(self, job_id: str) -> bool:
        """Is the keys file there?"""
        return self._path(job_id, "keys.arrow").exists()

    def keys(self, job_ids: Sequence[str]) -> pl.DataFrame:
        """``key``, ``attempt``, ``job_id`` of these jobs, job by job in the order of their lines.

        A job that closes at the same moment takes its file along: read the open jobs and their keys
        within one ledger transaction, or look again before believing that a file is lost.

        Raises
        ------
        CacheCorrupt
            A file is missing, truncated or foreign: its requests are known to nobody, so nothing is
            sent that might be among them.
        """
        frames = [self._read(job_id).with_columns(job_id=pl.lit(job_id)) for job_id in job_ids]
        return pl.concat(frames) if frames else pl.DataFrame(schema={**_KEYS, "job_id": pl.String})

    def key_prefixes(self, job_ids: Sequence[str]) -> pl.DataFrame:
        """``key`` (its first 16 bytes as UInt128, big-endian) and ``job_id``.

        Kept in memory, for the files never change. Raises as `keys` does.
        """
        self._forget_removed(job_ids)
        frames = []
        for job_id in job_ids:
            known = self._prefixes.get(job_id)
            if known is None:
                known = self._prefixes[job_id] = _prefixes(self.keys([job_id]))
            frames.append(known)
        return pl.concat(frames) if frames else pl.DataFrame(schema={"key": pl.UInt128, "job_id": pl.String})

    def prefixes_in_memory(self, job_ids: Iterable[str]) -> list[list[int]] | None:
        """The keys of each, without any work for Polars' threads; None if a file had to be read for that."""
        frames = [self._prefixes.get(job_id) for job_id in job_ids]
        known = [frame["key"].to_list() for frame in frames if frame is not None]
        return known if len(known) == len(frames) else None

    def requests_path(self, job_id: str) -> Path:
        """The request file."""
        return self._path(job_id, "requests.jsonl")

    def download_path(self, job_id: str, name: str) -> Path:
        """Where a download of that name goes; `remove` takes it along."""
        return self._path(job_id, name)

    def write_requests(self, job_id: str, chunks: Iterable[bytes]) -> int:
        """Stream the request file to disk, durable on return; gives its size in bytes."""
        size = 0

        def write(file: BinaryIO) -> None:
            nonlocal size
            for chunk in chunks:
                size += file.write(chunk)

        self._write(self.requests_path(job_id), write)
        return size

    def scratch(self) -> Scratch:
        """Room on disk for frames that would not fit into memory; nothing is made before it is used."""
        return Scratch(self._directory)

    def remove(self, job_id: str) -> None:
        """Remove all files of a job, half-written ones included; missing ones are fine."""
        self._prefixes.pop(job_id, None)
        with os_errors(self._directory):
            for path, owner in self._files():
                if owner == job_id:
                    path.unlink(missing_ok=True)

    def leftovers(self, open_jobs: Collection[str], *, idle: float = _IDLE) -> list[str]:
        """Jobs that have files but are not open: a process died between the files and the ledger.

        Parameters
        ----------
        open_jobs
            Ids of all open jobs.
        idle
            Files younger than this many seconds count as being worked on: a claim writes its files
            before it has a record in the ledger.
        """
        before = time.time() - idle
        newest: dict[str, float] = {}
        for path, owner in self._files():
            try:
                changed = path.stat().st_mtime
            except FileNotFoundError:
                continue
            newest[owner] = max(changed, newest.get(owner, changed))
        return sorted(owner for owner in newest.keys() - set(open_jobs) if newest[owner] <= before)

    def _files(self) -> Iterator[tuple[Path, str]]:
        """All files, each with the id of its job; those that `write_atomic` has begun start with a dot."""
        if self._directory.is_dir():
            for path in list(self._directory.iterdir()):
                yield path, path.name.removeprefix(".").partition(".")[0]

    def _path(self, job_id: str, name: str) -> Path:
        # Ids may come from a provider's list, that is from outside.
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,150}", job_id) or not re.fullmatch(r"[\w.-]{1,60}", name):
            raise ValueError(f"not a job and a file of it: {job_id!r}, {name!r}")
        return self._directory / f"{job_id}.{name}"

    def _write(self, path: Path, write: Callable[[BinaryIO], None]) -> None:
        with os_errors(self._directory):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, write)

    def _read(self, job_id: str) -> pl.DataFrame:
        path = self._path(job_id, "keys.arrow")
        try:
            return _parse(path.read_bytes())
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise CacheCorrupt(
                f"The keys of the open job {job_id} cannot be read: {error}.",
                path=str(path),
                hint=f"pllm.abandon({job_id!r}) gives the job up; pllm.recover(...) reads back from the"
                " provider what it has paid for. Until then nothing is sent that may be among its requests.",
            ) from error

    def _forget_removed(self, wanted: Sequence[str]) -> None:
        for job_id in set(self._prefixes) - set(wanted):
            if not self._path(job_id, "keys.arrow").exists():
                self._prefixes.pop(job_id, None)


class Scratch:
    """Frames on disk, in a file without a name: it is gone when the process is. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._ends = [0]
        self._frames: list[pl.DataFrame] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, frame: pl.DataFrame) -> None:
        """Put a frame behind the others."""
        if pl.Object in frame.dtypes:  # what only Python knows stays in memory
            self._frames.append(frame)
            return
        with os_errors(self._directory):
            if self._file is None:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 (closed at exit)
            arrow = BytesIO()
            frame.write_ipc(arrow, compression="lz4")
            self._file.write(arrow.getbuffer())
            self._ends.append(self._file.tell())

    def __iter__(self) -> Iterator[pl.DataFrame]:
        yield from self._frames
        for start, end in itertools.pairwise(self._ends):
            assert self._file is not None
            self._file.seek(start)
            yield pl.read_ipc(BytesIO(self._file.read(end - start)))


def _head(content: bytes | memoryview) -> bytes:
    return _MAGIC + hashlib.blake2b(content, digest_size=16).hexdigest().encode() + b"\n"


def _parse(data: bytes) -> pl.DataFrame:
    content = memoryview(data)[_HEAD_BYTES:]
    if not data.startswith(_MAGIC):
        raise ValueError("it is not a keys file")
    if data[:_HEAD_BYTES] != _head(content):
        raise ValueError("it is truncated or damaged")
    frame = pl.read_ipc(BytesIO(content))
    if frame.schema != pl.Schema(_KEYS) or not _are_keys(frame):
        raise ValueError("it holds something else than keys")
    return frame


def _are_keys(frame: pl.DataFrame) -> bool:
    whole = frame["key"].bin.size() == _KEY_BYTES
    return frame["attempt"].null_count() == 0 and whole.fill_null(False).all()


def _prefixes(keys: pl.DataFrame) -> pl.DataFrame:
    first = pl.col("key").bin.slice(0, 16).bin.reinterpret(dtype=pl.UInt128, endianness="big")
    return keys.select(first, "job_id")
