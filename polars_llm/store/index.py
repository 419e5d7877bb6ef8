"""The key index: where the answer to a key lies. A pure cache of the segments, rebuilt at any time.

It is a few runs, each sorted by key, each at least twice as long as the next. New segments become a run
at the end, and runs of like length become one, so that an index of millions isn't sorted anew for each
pack of answers. A run is joined with the sorted keys: 100,000 keys against 5 million take 12 ms, where a
join that hashes those 5 million takes 150 ms. Few keys in a long run are searched for one by one.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Self

import polars as pl

from polars_llm.store.directory import write_atomic

__all__ = ["INDEX_SCHEMA", "KeyIndex", "load", "save"]

INDEX_SCHEMA: Mapping[str, pl.DataType] = {
    "key": pl.UInt128(),
    "state": pl.UInt8(),
    "attempt": pl.UInt16(),
    "segment": pl.UInt32(),
    "row": pl.UInt32(),
}
_FACTS = [name for name in INDEX_SCHEMA if name != "key"]
_FORMAT = "polars_llm.index.1"
# The join passes over the whole run, 1.1 ms for each million entries; a search costs 0.5 us for each key.
# Where a run is so many times as long as the keys are many, both take as long.
_SPARSE = 512


@dataclasses.dataclass(frozen=True, slots=True)
class KeyIndex:
    """One entry for each key: its best answer. Immutable.

    Parameters
    ----------
    runs
        Frames of INDEX_SCHEMA, oldest first, each sorted by key and with each key once. The entry in the
        last run that holds a key is the one that counts.
    """

    runs: tuple[pl.DataFrame, ...] = ()

    @property
    def height(self) -> int:
        """Entries, those that do not count any more included."""
        return sum(run.height for run in self.runs)

    def find(self, keys: pl.Series) -> pl.DataFrame:
        """INDEX_SCHEMA, one row for each of `keys`, in their order; nulls for those that are unknown."""
        wanted = keys.alias("key").to_frame().with_row_index("position").sort("key")
        found = wanted.with_columns(pl.lit(None, INDEX_SCHEMA[name]).alias(name) for name in _FACTS)
        for number, run in enumerate(reversed(self.runs)):
            hits = _hits(wanted, run)
            newer = [pl.coalesce(found[name], hits[name]).alias(name) for name in _FACTS]
            found = hits.with_columns(newer) if number else hits
        return found.sort("position").select(*INDEX_SCHEMA)

    def extended(self, entries: pl.DataFrame, ranks: pl.Series) -> Self:
        """With entries of more segments.

        Parameters
        ----------
        entries
            INDEX_SCHEMA, in any order, keys perhaps more than once.
        ranks
            By number of a segment, its place in the written order; a segment that is gone ranks last.
        """
        new = _best_of_each(entries, ranks)
        if self.runs:
            new = _settled(self.find(new["key"]), new, ranks)
        runs = [*self.runs, new]
        while len(runs) > 1 and runs[-2].height < 2 * runs[-1].height:
            runs[-2:] = [_joined(runs[-2], runs[-1])]
        return type(self)(tuple(runs))

    def merged(self) -> Self:
        """The same as a single run."""
        runs = list(self.runs)
        while len(runs) > 1:
            runs[-2:] = [_joined(runs[-2], runs[-1])]
        return type(self)(tuple(runs))


def _hits(wanted: pl.DataFrame, run: pl.DataFrame) -> pl.DataFrame:
    """`wanted`, sorted by key, with what the run says of each; nulls for keys that it does not have."""
    if wanted.is_empty() or run.height <= _SPARSE * wanted.height:
        return wanted.join(run, on="key", how="left", maintain_order="left")
    at = run["key"].search_sorted(wanted["key"]).clip(0, run.height - 1)
    near = run.select(pl.all().gather(at))
    same = (near["key"] == wanted["key"]).fill_null(False)
    return wanted.with_columns(pl.when(same).then(near[name]).alias(name) for name in _FACTS)


def _best_of_each(entries: pl.DataFrame, ranks: pl.Series) -> pl.DataFrame:
    entries = entries.select(*INDEX_SCHEMA).sort("key")
    same = entries["key"] == entries["key"].shift()
    if not same.any():
        return entries
    twice = (same | same.shift(-1)).fill_null(False)
    best = (
        entries.filter(twice)
        .with_columns(rank=ranks.gather(entries.filter(twice)["segment"]))
        .sort("key", "state", "rank", "row")
        .with_columns(pl.col("attempt").max().over("key"))
        .unique("key", keep="first", maintain_order=True)
    )
    return pl.concat([entries.filter(~twice), best.select(*INDEX_SCHEMA)]).sort("key")


def _settled(known: pl.DataFrame, new: pl.DataFrame, ranks: pl.Series) -> pl.DataFrame:
    """Of what is known of a key and what is new, row by row, the better one."""
    if known["state"].null_count() == known.height:
        return new
    earlier = ranks.gather(known["segment"]) < ranks.gather(new["segment"])
    stays = (known["state"] < new["state"]) | ((known["state"] == new["state"]) & earlier)
    facts = [
        pl.when(stays.fill_null(False)).then(known[name]).otherwise(pl.col(name)).alias(name)
        for name in _FACTS
        if name != "attempt"
    ]
    return new.with_columns(*facts, attempt=pl.max_horizontal(pl.col("attempt"), known["attempt"]))


def _joined(older: pl.DataFrame, newer: pl.DataFrame) -> pl.DataFrame:
    both = pl.concat([older, newer]).sort("key")
    if not (both["key"] == both["key"].shift()).any():
        return both
    return pl.concat([older.join(newer, on="key", how="anti"), newer]).sort("key")


def save(path: Path, index: KeyIndex, covered: Sequence[tuple[str, str]]) -> None:
    """Write an index and what it covers: for each number, name and stamp of the segment."""
    rows = index.merged().runs[0]

    def write(file: BinaryIO) -> None:
        # The IPC file has no checksum of its own, and a wrong state in it would be believed.
        ipc = rows.write_ipc(None, compression="uncompressed").getbuffer()
        head = {"format": _FORMAT, "covered": covered, "crc32": zlib.crc32(ipc)}
        file.write(json.dumps(head).encode() + b"\n")
        file.write(ipc)

    write_atomic(path, write)


def load(path: Path) -> tuple[KeyIndex, list[tuple[str, str]]] | None:
    """Read an index and what it covers; None if it is missing, or anything about it is wrong."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline())
            ipc = file.read()
        if head["format"] != _FORMAT or head["crc32"] != zlib.crc32(ipc):
            return None
        covered = [(str(name), str(stamp)) for name, stamp in head["covered"]]
        rows = pl.read_ipc(ipc)
        del ipc
    except (OSError, ValueError, TypeError, KeyError, pl.exceptions.PolarsError):
        return None
    if rows.schema != pl.Schema(INDEX_SCHEMA) or not rows["key"].is_sorted():
        return None
    # The file has a chunk for every 122,880 rows, of which Polars would make one in every look-up.
    return KeyIndex((rows.rechunk().with_columns(pl.col("key").set_sorted()),)), covered
