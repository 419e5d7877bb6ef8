"""The results: immutable Parquet segments, in the order they came, and the index of their keys.

A segment is written once and never changed: to a temporary file, fsynced, renamed. Any number of
processes add and read without talking to each other; the directory is the truth, the index a cache of
it. Merging small segments writes the merged one first and removes the others after it, so that a reader
always finds every answer in at least one.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import polars as pl

from polars_llm.answer import ANSWER_SCHEMA
from polars_llm.errors import CacheCorrupt, CacheError
from polars_llm.store import locks
from polars_llm.store.directory import os_errors, write_atomic
from polars_llm.store.index import KeyIndex

__all__ = ["ParquetResults", "ResultStore"]


class ResultStore(Protocol):
    """Answers by key; what `add` has returned from is durable."""

    def add(self, answers: pl.DataFrame) -> None:
        """Store answers (ANSWER_SCHEMA)."""

    def find(self, keys: pl.Series) -> pl.DataFrame:
        """Where the best answer to each key is: INDEX_SCHEMA, in the order of `keys`, nulls if unknown."""

    def read(self, found: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
        """Columns of what `find` found, in its order; nulls where it found nothing."""

    def scan(self) -> pl.LazyFrame:
        """Everything, one row a key."""

    def compact(self) -> None:
        """Merge what is small; cheap when there is nothing to do."""


_INDEX_FILE = "index.arrow"
_ROW_GROUP = 25_000
# The index is written anew when this share of it is not in the file yet.
_STALE_SHARE = 0.1
_STALE_ROWS = 20_000
# Merging: this many neighbours under this size become one.
_SMALL_ROWS = 50_000
_MANY = 32
_MERGED_ROWS = 1_000_000
_OLD_SECONDS = 86_400.0


class ParquetResults:
    """Results in a directory; nothing is opened before the first call."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._index = KeyIndex()
        self._numbers: dict[str, int] = {}  # of every segment this process has seen, gone ones too
        self._saved_rows = 0
        self._lock = threading.Lock()

    def add(self, answers: pl.DataFrame) -> None:
        """One new segment."""
        if answers.schema != pl.Schema(ANSWER_SCHEMA):
            raise ValueError(f"answers have the schema {answers.schema}, not ANSWER_SCHEMA")
        if answers.height:
            self._write(f"{time.time_ns():020d}-{secrets.token_hex(4)}.parquet", answers)

    def _write(self, name: str, answers: pl.DataFrame) -> None:
        with os_errors(self._directory):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(
            self._directory / name,
            lambda file: answers.write_parquet(
                file, compression="zstd", compression_level=1, row_group_size=_ROW_GROUP, statistics=False
            ),
        )

    def find(self, keys: pl.Series) -> pl.DataFrame:
        """Look the keys up, in all that is durable now."""
        return self._current().find(keys)

    def read(self, found: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
        """Read only the segments that are hit, and of those only the range of rows that is."""
        schema = {name: ANSWER_SCHEMA[name] for name in columns}
        if found["segment"].null_count() == found.height:
            return (
                found.select("key")
                .with_columns(pl.lit(None, t).alias(n) for n, t in schema.items())
                .select(columns)
            )
        while True:
            try:
                return _gather(self._directory, self._names_of(found), found, schema)
            except FileNotFoundError:
                # Merged away since: the answers are in another segment now.
                again = self._rebuilt().find(found["key"])
                known = found["segment"].is_not_null()
                found = again.with_columns(
                    pl.when(known).then(pl.col(c)).alias(c) for c in ("segment", "row", "state")
                )

    def scan(self) -> pl.LazyFrame:
        """Everything, one row a key, as a lazy frame over the segments."""
        index = self._current()
        if not index.segments:
            return pl.LazyFrame(schema=ANSWER_SCHEMA)
        lazy = []
        by_segment = index.rows.select("segment", "row").sort("segment", "row")
        for (segment,), part in by_segment.partition_by("segment", as_dict=True, maintain_order=True).items():
            whole = _scan(self._directory / index.segments[int(segment)], ANSWER_SCHEMA)
            rows = part["row"]
            rows.len()
            keep = part.lazy().select("row")
            lazy.append(whole.with_row_index("row").join(keep, on="row", how="semi").drop("row"))
        return pl.concat(lazy)

    def compact(self) -> None:
        """Merge runs of small neighbours into segments of up to a million rows."""
        small = self._small()
        if len(small) < _MANY:
            return
        with locks.try_hold(self._directory / ".compact.lock") as ours:
            if not ours:
                return
            names = self._small()  # somebody may have merged them before we got the lock
            if len(names) < _MANY:
                return
            merged = pl.concat([_scan(self._directory / name, ANSWER_SCHEMA) for name in names]).collect()
            # It takes the place of its first part in the order of writing.
            self._write(f"{names[0].split('-')[0]}-{secrets.token_hex(4)}.parquet", merged)
            for name in names:
                (self._directory / name).unlink(missing_ok=True)
            self._remove_old_temporaries()

    def _small(self) -> list[str]:
        """The first run of small neighbours that is worth merging."""
        index = self._current()
        counts = dict(index.rows.group_by("segment").len().rows())
        sizes = {name: counts.get(number, 0) for number, name in index.segments.items()}
        run: list[str] = []
        total = 0
        for name in sorted(sizes):
            if sizes[name] >= _SMALL_ROWS or total + sizes[name] > _MERGED_ROWS:
                if len(run) >= _MANY:
                    return run
                run, total = [], 0
                continue
            run.append(name)
            total += sizes[name]
        return run

    def _remove_old_temporaries(self) -> None:
        for path in self._directory.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _OLD_SECONDS:
                    path.unlink()

    def _names(self) -> list[str]:
        try:
            return sorted(p.name for p in self._directory.iterdir() if p.name.endswith(".parquet"))
        except FileNotFoundError:
            return []

    def _current(self) -> KeyIndex:
        """The index over what is on disk now; extended by what is new, rebuilt if something went."""
        with self._lock:
            names = self._names()
            if not set(self._index.segments.values()) <= set(names):
                self._index, self._saved_rows = KeyIndex(), 0
            if len(names) != len(self._index.segments):
                self._extend(names)
            return self._index

    def _names_of(self, found: pl.DataFrame) -> dict[int, str]:
        with self._lock:
            names = {number: name for name, number in self._numbers.items()}
        return {number: names[number] for number in found["segment"].drop_nulls().unique()}

    def _rebuilt(self) -> KeyIndex:
        with self._lock:
            self._index, self._saved_rows = KeyIndex(), 0
        return self._current()

    def _extend(self, names: Sequence[str]) -> None:
        if not self._numbers:
            saved = KeyIndex.load(self._directory / _INDEX_FILE)
            if set(saved.segments.values()) <= set(names):
                self._index, self._saved_rows = saved, saved.rows.height
                self._numbers = {name: number for number, name in saved.segments.items()}
        covered = set(self._index.segments.values())
        new = [name for name in names if name not in covered]
        if new:
            parts = [_keys(self._directory / name) for name in new]
            for name in new:
                self._numbers.setdefault(name, max(self._numbers.values(), default=-1) + 1)
            self._index = self._index.extended({self._numbers[name]: name for name in new}, parts)
        unsaved = self._index.rows.height - self._saved_rows
        if unsaved > max(_STALE_ROWS, _STALE_SHARE * self._index.rows.height):
            with contextlib.suppress(CacheError):  # read-only: the index stays in memory
                self._index.save(self._directory / _INDEX_FILE)
                self._saved_rows = self._index.rows.height


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (pl.exceptions.PolarsError, OSError) as error:
        if not path.exists():
            raise FileNotFoundError(path) from error
        raise CacheCorrupt(
            f"The results file {path} is damaged or foreign: {error}",
            path=str(path),
            hint="move that file away, then pllm.recover('openai') reads its answers back from the"
            " provider. Until then nothing is sent, so nothing is paid twice.",
        ) from error


def _scan(path: Path, schema: Mapping[str, pl.DataType]) -> pl.LazyFrame:
    """A segment, with nulls for columns that an older version did not write."""
    with _readable(path):
        if not path.exists():
            raise FileNotFoundError(path)
        lazy = pl.scan_parquet(path, glob=False)
        have = lazy.collect_schema().names()
    columns = [pl.col(n).cast(t) if n in have else pl.lit(None, t).alias(n) for n, t in schema.items()]
    return lazy.select(columns)


def _keys(path: Path) -> pl.DataFrame:
    with _readable(path):
        return (
            pl.scan_parquet(path, glob=False)
            .select(
                pl.col("key").bin.slice(0, 16).bin.reinterpret(dtype=pl.UInt128, endianness="big"),
                pl.col("state").cast(pl.UInt8),
                pl.col("attempt").cast(pl.UInt16),
            )
            .collect()
        )


def _gather(
    directory: Path, names: Mapping[int, str], found: pl.DataFrame, schema: Mapping[str, pl.DataType]
) -> pl.DataFrame:
    """The rows of `found`, from one pass over the ranges that are hit."""
    ranges = (
        found.lazy()
        .filter(pl.col("segment").is_not_null())
        .group_by("segment")
        .agg(first=pl.col("row").min(), last=pl.col("row").max())
        .sort("segment")
        .with_columns(height=pl.col("last") - pl.col("first") + 1)
        .with_columns(start=pl.col("height").cum_sum() - pl.col("height"))
        .collect()
    )
    parts = []
    for segment, first, _, height, _ in ranges.iter_rows():
        path = directory / names[segment]
        parts.append(_scan(path, schema).slice(first, height))
    with _readable(directory / names[ranges["segment"][0]]):
        values = pl.concat(parts).collect()
    offset = dict(zip(ranges["segment"], ranges["start"].cast(pl.Int64) - ranges["first"], strict=True))
    shift = (
        pl.col("segment").replace_strict(offset, default=None, return_dtype=pl.Int64)
        if len(offset) > 1
        else pl.when(pl.col("segment").is_not_null()).then(pl.lit(next(iter(offset.values())), pl.Int64))
    )
    place = found.select(shift + pl.col("row").cast(pl.Int64)).to_series()
    in_order = (
        place.len() == values.height and not place.has_nulls() and (place.diff().drop_nulls() == 1).all()
    )
    return values if in_order else values[place.cast(pl.UInt32)]
