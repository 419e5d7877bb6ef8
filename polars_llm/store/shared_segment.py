"""Segments of a shared place: the same Parquet as local ones, read in parts and from many places at once.

Each page has its own checksum, because a reader fetches the pages that it needs and no more. A merged
segment is made of parts, which are the segments that it replaces, whole and under their old names: its
metadata lists them. So a merge changes no row's number, and it does no harm if two hosts merge the same
segments at the same time, or if somebody sees the old ones and the merged one together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from polars_llm.answer import ANSWER_SCHEMA, RETRY
from polars_llm.errors import CacheCorrupt, CacheError
from polars_llm.store.place import Place
from polars_llm.store.segment import METADATA, NAME, PLACE, SUFFIX, Moved, key_prefix, rows_in_group

__all__ = ["INDEXED", "Footer", "chunks", "encode", "entries", "fetch", "footer", "merged", "name_of", "take"]

# The others differ from row to row, and a dictionary of them is built in vain.
_REPEATED = ["state", "attempt", "error", "error_message", "finish_reason", "provider", "model", "job_id"]
_GROUPS_TOGETHER = 4
INDEXED = ["key", "state", "attempt"]


@dataclasses.dataclass(frozen=True, slots=True)
class Footer:
    """What is known of a segment without reading its rows.

    Parameters
    ----------
    parts
        Name and rows of each part, in the order of the rows.
    ends
        For each row group, the number of rows up to its end.
    metadata
        Arrow's own, so that it isn't fetched again.
    """

    parts: tuple[tuple[str, int], ...]
    ends: tuple[int, ...]
    metadata: Any

    @property
    def offsets(self) -> dict[str, int]:
        """Where each part begins."""
        starts = itertools.accumulate((rows for _, rows in self.parts), initial=0)
        return dict(zip((name for name, _ in self.parts), starts, strict=False))


def encode(answers: pl.DataFrame, parts: Sequence[tuple[str, int]] = ()) -> memoryview:
    """A segment as bytes."""
    import pyarrow.parquet

    group = rows_in_group(answers)
    said = {"group": group, "replaces": [name for name, _ in parts], "parts": list(parts)}
    table = answers.to_arrow(compat_level=pl.CompatLevel.oldest())
    table = table.replace_schema_metadata({METADATA: json.dumps(said)})
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        table,
        file,
        row_group_size=group,
        compression="zstd",
        compression_level=1,
        use_dictionary=_REPEATED,
        write_statistics=False,
        write_page_checksum=True,
    )
    return file.getbuffer()


def name_of(data: memoryview, known: Iterable[str]) -> str:
    """A new name for a segment, which comes after all that are known."""
    # The greatest of all, also when a clock was set back, or another host's is ahead.
    orders = [int(match["order"]) + 1 for match in map(NAME.fullmatch, known) if match]
    return f"{max([time.time_ns(), *orders]):020d}-{zlib.crc32(data):08x}{SUFFIX}"


def footer(place: Place, name: str) -> Footer:
    """Read it: two or three small requests.

    Raises
    ------
    FileNotFoundError
        The segment is gone.
    CacheCorrupt
        It is damaged or foreign.
    """

    def call() -> Footer:
        with _reading(place, name), _file(place, name) as file:
            found = file.metadata
            said = json.loads((found.metadata or {}).get(METADATA.encode(), b"{}"))
            parts = tuple((str(part), int(rows)) for part, rows in said.get("parts", ()))
            if sum(rows for _, rows in parts) not in {0, found.num_rows}:
                raise ValueError("its parts are not its rows")
            sizes = (found.row_group(n).num_rows for n in range(found.num_row_groups))
            return Footer(parts or ((name, found.num_rows),), tuple(itertools.accumulate(sizes)), found)

    return place.tried("read", call)


def fetch(place: Place, name: str, head: Footer, groups: Iterable[int], columns: Sequence[str]) -> Any:
    """Columns of some row groups, as an Arrow table: no work for Polars, whose threads may all be waiting.

    Raises
    ------
    FileNotFoundError, CacheCorrupt
        As `footer` does.
    """

    def call() -> Any:
        with _reading(place, name), _file(place, name, head) as file:
            there = [column for column in columns if column in file.schema_arrow.names]
            return file.read_row_groups(list(groups), columns=there)

    return place.tried("read", call)


def entries(place: Place, name: str, head: Footer, table: Any, numbers: Mapping[str, int]) -> pl.DataFrame:
    """What the index keeps of each row, of the parts that have a number here.

    Parameters
    ----------
    table
        The columns INDEXED, of all row groups.

    Raises
    ------
    CacheCorrupt
        The segment is damaged or foreign.
    """
    with _reading(place, name):
        rows = _frame(table, INDEXED).select(
            key_prefix(),
            "state",
            pl.col("attempt").fill_null(1),
            sound=(pl.col("key").bin.size() == 32) & (pl.col("state") <= RETRY),
        )
        if not rows["sound"].fill_null(False).all():
            raise ValueError("it has rows without a key or a state")
    parts, start = [], 0
    for part, height in head.parts:
        if part in numbers:
            parts.append(
                rows.drop("sound")
                .slice(start, height)
                .with_columns(
                    pl.lit(numbers[part], pl.UInt32).alias("segment"),
                    pl.int_range(height, dtype=pl.UInt32, eager=True).alias("row"),
                )
            )
        start += height
    return pl.concat(parts)


def chunks(head: Footer, rows: pl.Series) -> Iterator[tuple[int, int, list[int]]]:
    """Slices of `rows` (start, length) with the row groups that each lies in, a few groups at a time."""
    groups = pl.Series(head.ends).search_sorted(rows, side="right")
    hit = groups.rle()
    start = 0
    for first in range(0, hit.len(), _GROUPS_TOGETHER):
        some = hit.slice(first, _GROUPS_TOGETHER)
        length = int(some.struct.field("len").sum())
        yield start, length, some.struct.field("value").to_list()
        start += length


def take(
    place: Place,
    name: str,
    head: Footer,
    groups: Sequence[int],
    table: Any,
    wanted: pl.DataFrame,
    columns: Sequence[str],
) -> pl.DataFrame:
    """The columns at rows that lie in those row groups, as `chunks` gives them.

    Parameters
    ----------
    table
        What `fetch` gave for those groups, ``key`` included.
    wanted
        ``row``, ascending, and ``key``, the prefix that should be there.

    Raises
    ------
    CacheCorrupt
        The segment is damaged or foreign.
    Moved
        Those rows do not hold those keys.
    """
    with _reading(place, name):
        read = _frame(table, ["key", *(column for column in columns if column != "key")])
    starts = {g: head.ends[g - 1] if g else 0 for g in groups}
    before = itertools.accumulate((head.ends[g] - starts[g] for g in groups), initial=0)
    shift = {g: done - starts[g] for g, done in zip(groups, before, strict=False)}
    rows = wanted["row"]
    of_row = pl.Series(head.ends).search_sorted(rows, side="right")
    places = rows.cast(pl.Int64) + of_row.replace_strict(shift, return_dtype=pl.Int64)
    if places.len() != read.height or not (places == pl.int_range(read.height, eager=True)).all():
        # What is not asked for must not be kept in memory by the text of what is.
        dense = rows.len() * 2 > read.height
        read = read.rechunk() if dense else pl.concat([read.head(1), read.tail(-1)], rechunk=False)
        read = read.select(pl.all().gather(places))
    if not (read.select(key_prefix()).to_series() == wanted["key"]).all(ignore_nulls=False):
        raise Moved(name)
    return read.select(columns)


def merged(place: Place, sources: Mapping[str, Footer]) -> tuple[str, memoryview]:
    """One segment that has each part of these once, and its name.

    Raises
    ------
    FileNotFoundError
        One of them is gone.
    CacheCorrupt
        One is damaged, or has columns unknown to this version, which must not get lost.
    """
    frames: dict[str, pl.DataFrame] = {}
    for name, head in sources.items():
        rows = _whole(place, name, head)
        for part, start in head.offsets.items():
            frames.setdefault(part, rows.slice(start, dict(head.parts)[part]))
    parts = [(part, frames[part].height) for part in sorted(frames)]
    together = pl.concat([frames[part] for part, _ in parts])
    data = encode(together, parts)
    # The old ones are to be removed one day, and they were paid for.
    if not pl.read_parquet(io.BytesIO(data), columns=INDEXED).equals(together.select(INDEXED)):
        raise _corrupt(place, name, "merged, it does not have the rows that it had before")
    return f"{parts[0][0][:PLACE]}-{zlib.crc32(data):08x}{SUFFIX}", data


def _whole(place: Place, name: str, head: Footer) -> pl.DataFrame:
    with _reading(place, name):
        strange = set(head.metadata.schema.to_arrow_schema().names) - set(ANSWER_SCHEMA)
        if strange:
            raise ValueError(f"it has columns {sorted(strange)}")
    table = fetch(place, name, head, range(len(head.ends)), list(ANSWER_SCHEMA))
    with _reading(place, name):
        return _frame(table, list(ANSWER_SCHEMA))


@contextlib.contextmanager
def _file(place: Place, name: str, head: Footer | None = None) -> Iterator[Any]:
    import pyarrow.parquet

    with place.open(name) as source:
        yield pyarrow.parquet.ParquetFile(
            source,
            metadata=head.metadata if head else None,
            pre_buffer=True,  # the ranges of all columns at once
            page_checksum_verification=True,
        )


def _frame(table: Any, columns: Sequence[str]) -> pl.DataFrame:
    """Those columns; null where an older version wrote none."""
    read = pl.DataFrame(pl.from_arrow(table))
    missing = [pl.lit(None, ANSWER_SCHEMA[n]).alias(n) for n in columns if n not in read.columns]
    return read.with_columns(missing).select(pl.col(n).cast(ANSWER_SCHEMA[n]) for n in columns)


# How Arrow and Polars say that bytes are no Parquet, or not those that were written; Arrow also as OSError.
_DAMAGE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError, TypeError, KeyError)
_DAMAGED = ("checksum", "thrift", "ompress", "magic bytes", "Unexpected end", "orrupt", "arquet", "page")


@contextlib.contextmanager
def _reading(place: Place, name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, CacheError):
        raise
    except OSError as error:
        if error.errno is None and any(word in str(error) for word in _DAMAGED) and "Error" not in str(error):
            raise _corrupt(place, name, str(error)) from error
        raise
    except _DAMAGE as error:
        raise _corrupt(place, name, str(error)) from error


def _corrupt(place: Place, name: str, why: str) -> CacheCorrupt:
    path = f"{place.name}/results/{name}"
    return CacheCorrupt(
        f"The results file {path} is damaged, or not one of ours: {next(iter(why.splitlines()), '')}.",
        path=path,
        hint="move it away from there. Then pllm.recover('openai') (or 'anthropic') reads its answers back"
        " from the provider without paying again; running the same line again pays for them a second time."
        " Nothing was sent.",
    )
