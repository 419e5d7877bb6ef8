"""Segments: the immutable Parquet files that hold the answers, one for each time that answers are added.

A name is ``{order}-{checksum}.parquet``; the sorted names are the written order. A merged segment takes the
place of the first one that it replaces: ``{order}-{checksum of that one}-{checksum}.parquet``, and its
metadata lists all that it replaces. The checksum is what tells an answer from one that a disk or a copy
has damaged, since Parquet's own are neither written nor read by Polars.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO, Literal

import polars as pl

from polars_llm.answer import ANSWER_SCHEMA, RETRY
from polars_llm.errors import CacheCorrupt, CacheError
from polars_llm.store.directory import write_atomic

__all__ = [
    "METADATA",
    "NAME",
    "PLACE",
    "SPAN",
    "SUFFIX",
    "Moved",
    "due",
    "entries",
    "key_prefix",
    "merge",
    "replaced",
    "rows_in_group",
    "take",
    "unfinished",
    "write",
]

SUFFIX = ".parquet"

# Row groups are decoded whole, 1 ms for 5 MB. Larger ones read little faster, smaller ones cost metadata.
_ROWS_IN_GROUP = 1 << 13
_BYTES_IN_GROUP = 1 << 24
_GROUPS_TOGETHER = 4

SPAN = 1 << 19
"""`take` is called for rows of one span, that is with the same ``row // SPAN``."""

NAME = re.compile(r"(?P<order>\d{20})-[0-9a-f]{8}(?P<merge>-[0-9a-f]{8})?\.parquet")
PLACE = len("00000000000000000000-00000000")
METADATA = "polars_llm"

# Merging: a neighbour is taken in if it is not larger than what was gathered so far, so that each answer is
# written again a logarithmic number of times only; very small ones always.
_MANY = 8
_SMALL = 1 << 14
_LARGE = 1 << 26


# What Polars raises for bytes that are no Parquet; on some it panics. The rest is for our own metadata.
_DAMAGE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError, TypeError)


@dataclasses.dataclass(frozen=True, slots=True)
class _Metadata:
    """What a segment says about itself: rows in a group, and the names that it replaces."""

    group: int = _ROWS_IN_GROUP
    replaces: list[str] = dataclasses.field(default_factory=list)

    def layout(self) -> dict[str, Any]:
        return {
            "compression": "zstd",
            "compression_level": 1,  # level 3 is 8 % smaller and takes 1.6 times as long to write
            "row_group_size": self.group,
            "statistics": False,  # keys are random, and nothing else is looked for
            "metadata": {METADATA: json.dumps(dataclasses.asdict(self))},
        }


class Moved(Exception):
    """What was looked for is not there any more, or never was: look again."""


def write(directory: Path, answers: pl.DataFrame, listed: Callable[[], Iterable[str]]) -> None:
    """Write a segment: durable on return, all of it or nothing.

    Parameters
    ----------
    directory
        Where.
    answers
        Columns of ANSWER_SCHEMA.
    listed
        The names that are there; asked for at the last moment, for the new name comes after them.
    """
    file = io.BytesIO()
    answers.write_parquet(file, **_Metadata(rows_in_group(answers)).layout())
    # The greatest of all, also when a clock was set back.
    orders = [int(match["order"]) + 1 for match in map(NAME.fullmatch, listed()) if match]
    _put(directory, f"{max([time.time_ns(), *orders]):020d}", file.getbuffer())


def rows_in_group(answers: pl.DataFrame) -> int:
    """Embeddings and long answers have fewer rows in a group."""
    fitting = max(_BYTES_IN_GROUP * answers.height // max(int(answers.estimated_size()), 1), 1)
    return min(1 << (fitting.bit_length() - 1), _ROWS_IN_GROUP)


def _put(directory: Path, place: str, data: memoryview) -> None:
    name = f"{place}-{zlib.crc32(data):08x}{SUFFIX}"

    def copy(file: BinaryIO) -> None:
        file.write(data)

    write_atomic(directory / name, copy)


def _metadata(path: Path) -> _Metadata:
    said = json.loads(pl.read_parquet_metadata(path).get(METADATA, "{}"))
    return _Metadata(int(said.get("group", _ROWS_IN_GROUP)), list(said.get("replaces", [])))


def key_prefix() -> pl.Expr:
    """What is looked up: the first 16 of the key's 32 bytes."""
    return pl.col("key").bin.slice(0, 16).bin.reinterpret(dtype=pl.UInt128, endianness="big")


def entries(path: Path, number: int) -> pl.DataFrame:
    """What the index keeps of each row: key, state, attempt, segment (that number), row.

    Raises
    ------
    FileNotFoundError
        The segment is gone: merged away, most likely.
    CacheCorrupt
        The segment is damaged or foreign.
    """
    with _reading(path):
        _verify(path)
        rows = (
            _scan(path, ["key", "state", "attempt"], row_index="row")
            .select(
                key_prefix(),
                "state",
                pl.col("attempt").fill_null(1),
                pl.lit(number, pl.UInt32).alias("segment"),
                pl.col("row").cast(pl.UInt32),
                sound=(pl.col("key").bin.size() == 32) & (pl.col("state") <= RETRY),
            )
            .collect(engine="streaming")
        )
    if not rows["sound"].fill_null(False).all():
        raise _corrupt(path, "it has rows without a key or a state")
    return rows.drop("sound")


def _verify(path: Path) -> None:
    """Compare what is in the file with its name: 0.06 s for the 276 MB of a million answers."""
    if NAME.fullmatch(path.name) is None:
        return
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while part := file.read(1 << 18):
            checksum = zlib.crc32(part, checksum)
    if not path.stem.endswith(f"-{checksum:08x}"):
        raise ValueError("its content does not have the checksum that is in its name")


def take(path: Path, rows: pl.Series, keys: pl.Series, columns: Sequence[str]) -> pl.DataFrame:
    """The columns at `rows`: ascending, at least one, all within one span.

    Raises
    ------
    FileNotFoundError
        The segment is gone: merged away, most likely.
    Moved
        Those rows do not hold `keys`.
    CacheCorrupt
        The segment is damaged or foreign.
    """
    wanted = ["key", *(name for name in columns if name != "key")]
    found = pl.concat([_pick(path, wanted, part) for part in _read_together(path, rows)])
    if not (found.select(key_prefix()).to_series() == keys).all(ignore_nulls=False):
        raise Moved(str(path))
    return found.select(columns)


def _read_together(path: Path, rows: pl.Series) -> Iterator[pl.Series]:
    """All at once if they lie close together, else those of a few row groups after the other."""
    if int(rows[-1]) - int(rows[0]) < 2 * rows.len():
        yield rows
        return
    with _reading(path):
        height = _GROUPS_TOGETHER * _metadata(path).group
    start = 0
    for length in (rows // height).rle().struct.field("len"):
        yield rows.slice(start, length)
        start += length


def _pick(path: Path, columns: Sequence[str], rows: pl.Series) -> pl.DataFrame:
    first, last = int(rows[0]), int(rows[-1])
    with _reading(path):
        found = _scan(path, columns).slice(first, last - first + 1).collect(engine="streaming")
    if found.height <= last - first:
        raise Moved(str(path))
    places = (rows - first).rename("places")
    if found.height == rows.len() and (places == pl.int_range(rows.len(), eager=True)).all():
        return found
    # Polars gathers from one chunk by sharing its text, and from several by copying. The one saves time, the
    # other does not keep the text of a thousand rows for one of them.
    dense = rows.len() * 2 > found.height
    found = found.rechunk() if dense else pl.concat([found.head(1), found.tail(-1)], rechunk=False)
    return found.select(pl.all().gather(places))


def due(sizes: Mapping[str, int], fixed: Set[str] = frozenset()) -> list[str]:
    """Neighbours that should become one segment now, in written order; empty if it would not pay.

    Parameters
    ----------
    sizes
        Name -> bytes, of all segments.
    fixed
        Names that must stay as they are. So do those that a person gave.
    """
    groups: list[list[str]] = []
    total = 0
    for name in sorted(sizes, reverse=True):
        size = sizes[name]
        free = name not in fixed and NAME.fullmatch(name) is not None
        if free and groups and size <= max(total, _SMALL) and total + size <= _LARGE:
            groups[-1].append(name)
            total += size
        else:
            groups.append([name] if free else [])
            total = size if free else _LARGE  # nothing joins it
    return next((group[::-1] for group in groups if len(group) >= _MANY), [])


def merge(directory: Path, names: Sequence[str], still_neighbours: Callable[[], bool]) -> None:
    """Write one segment that holds the rows of `names`, in that order; those are left alone.

    Raises
    ------
    Moved
        One of them is gone, or another one came between them meanwhile; nothing was written.
    CacheCorrupt
        One of them is damaged, or has columns unknown to this version, which must not get lost.
    """
    try:
        file = _encode_together(directory, names)
    except FileNotFoundError as error:
        raise Moved(names[0]) from error
    if not still_neighbours():
        raise Moved(names[0])
    _put(directory, names[0][:PLACE], file.getbuffer())


def _encode_together(directory: Path, names: Sequence[str]) -> io.BytesIO:
    paths = [directory / name for name in names]
    for path in paths:
        with _reading(path):
            _verify(path)
    file = io.BytesIO()
    kept = ["key", "state", "attempt"]
    with _reading(directory):
        rows = pl.concat([_scan(path, list(ANSWER_SCHEMA), extra="raise") for path in paths])
        metadata = _Metadata(min(_metadata(path).group for path in paths), list(names))
        rows.sink_parquet(file, **metadata.layout(), engine="streaming")
        old = pl.concat([_scan(path, kept).collect(engine="streaming") for path in paths])
    file.seek(0)
    # The old ones are about to be removed, and they were paid for.
    if not pl.read_parquet(file, columns=kept).equals(old):
        raise _corrupt(directory, "its segments, merged, do not have the rows that they had before")
    return file


def unfinished(listed: Iterable[str]) -> list[str]:
    """Merged segments that share their place with one that they replace, which therefore is still there."""
    places: dict[str, list[str]] = {}
    for name in listed:
        if NAME.fullmatch(name):
            places.setdefault(name[:PLACE], []).append(name)
    shared = (names for names in places.values() if len(names) > 1)
    return [name for names in shared for name in names if len(Path(name).stem) > PLACE]


def replaced(path: Path) -> list[str]:
    """Names of the segments whose rows a merged one holds, in written order; makes sure that it does."""
    with _reading(path):
        _verify(path)
        return _metadata(path).replaces


def _scan(
    path: Path,
    columns: Sequence[str],
    *,
    row_index: str | None = None,
    extra: Literal["ignore", "raise"] = "ignore",
) -> pl.LazyFrame:
    """Those columns; null where an older version wrote none."""
    return pl.scan_parquet(
        path,
        schema={name: ANSWER_SCHEMA[name] for name in columns},
        missing_columns="insert",
        extra_columns=extra,
        row_index_name=row_index,
        glob=False,
        use_statistics=False,
    )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CacheError(
            f"{path} in the cache cannot be read: {error}.",
            path=str(path),
            hint="make it readable for this user, then run the same line again. Nothing was sent.",
        ) from error
    except _DAMAGE as error:
        raise _corrupt(path, _first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _corrupt(path: Path, why: str) -> CacheCorrupt:
    return CacheCorrupt(
        f"The results file {path} is damaged, or not one of ours: {why}.",
        path=str(path),
        hint="move it out of that directory. Then pllm.recover('openai') (or 'anthropic') reads its answers"
        " back from the provider without paying again; running the same line again pays for them a"
        " second time. Nothing was sent.",
    )
