"""The working files of a job: its keys, its request file, its downloads. Gone when it is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import polars as pl

from polars_llm.errors import CacheCorrupt
from polars_llm.store.directory import os_errors, write_atomic

__all__ = ["Spool"]

_KEYS: dict[str, pl.DataType] = {"key": pl.Binary(), "attempt": pl.UInt16()}


class Spool:
    """Files named after their job."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._prefixes: dict[str, pl.DataFrame] = {}
        self._lock = threading.Lock()

    def write_keys(self, job_id: str, keys: pl.DataFrame) -> None:
        """Store what the job was made of: ``key`` (32 bytes) and ``attempt``, in the order of its lines."""
        frame = keys.select(pl.col(n).cast(t) for n, t in _KEYS.items())
        self._write(self._path(job_id, "keys.arrow"), frame.write_ipc)

    def keys(self, job_ids: Sequence[str]) -> pl.DataFrame:
        """``key``, ``attempt``, ``job_id`` of these jobs.

        Raises
        ------
        CacheCorrupt
            A file is missing, truncated or foreign: its requests are known to nobody, so nothing is
            sent that might be among them.
        """
        frames = [self._read(job_id).with_columns(job_id=pl.lit(job_id)) for job_id in job_ids]
        return pl.concat(frames) if frames else pl.DataFrame(schema={**_KEYS, "job_id": pl.String})

    def key_prefixes(self, job_ids: Sequence[str]) -> pl.DataFrame:
        """``key`` as UInt128 (its first 16 bytes) and ``job_id``; kept in memory, for files never change."""
        with self._lock:
            for job_id in set(self._prefixes) - set(job_ids):
                del self._prefixes[job_id]
            for job_id in job_ids:
                if job_id not in self._prefixes:
                    self._prefixes[job_id] = self.keys([job_id]).select(
                        pl.col("key").bin.slice(0, 16).bin.reinterpret(dtype=pl.UInt128, endianness="big"),
                        "job_id",
                    )
            frames = [self._prefixes[job_id] for job_id in job_ids]
        return pl.concat(frames) if frames else pl.DataFrame(schema={"key": pl.UInt128, "job_id": pl.String})

    def requests_path(self, job_id: str) -> Path:
        """The request file."""
        return self._path(job_id, "requests.jsonl")

    def download_path(self, job_id: str, name: str) -> Path:
        """Where a download goes."""
        return self._path(job_id, name)

    def write_requests(self, job_id: str, chunks: Iterable[bytes]) -> None:
        """Stream the request file to disk."""

        def write(file: BinaryIO) -> None:
            for chunk in chunks:
                file.write(chunk)

        self._write(self.requests_path(job_id), write)

    def remove(self, job_id: str) -> None:
        """Remove all files of a job; missing ones are fine."""
        for path in self._directory.glob(f"{job_id}.*"):
            path.unlink(missing_ok=True)

    def leftovers(self, open_jobs: Collection[str]) -> list[str]:
        """Jobs that have files but are not open: something stopped between closing and removing."""
        if not self._directory.exists():
            return []
        names = {path.name.split(".")[0] for path in self._directory.glob("job_*.*")}
        return sorted(names - set(open_jobs))

    def _path(self, job_id: str, name: str) -> Path:
        return self._directory / f"{job_id}.{name}"

    def _write(self, path: Path, write: Callable[[BinaryIO], None]) -> None:
        with os_errors(self._directory):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, write)

    def _read(self, job_id: str) -> pl.DataFrame:
        path = self._path(job_id, "keys.arrow")
        try:
            # From bytes: Polars may map a file into memory, and this one will be removed.
            frame = pl.read_ipc(path.read_bytes())
            if frame.schema != pl.Schema(_KEYS):
                raise ValueError(f"it has the columns {frame.columns}")
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise CacheCorrupt(
                f"The keys of the open job {job_id} cannot be read: {error}",
                path=str(path),
                hint=f"pllm.abandon({job_id!r}) gives the job up, then pllm.recover(...) reads its answers"
                " back from the provider. Until then nothing is sent that may be among its requests.",
            ) from error
        return frame
