"""The key index: where the answer to a key lies. A pure cache of the segments, rebuilt at any time.

Sorted by key, so that a look-up is a binary search: for 100,000 keys in an index of 5 million that is
0.04 s, where a hash join, which builds its table anew for each batch of rows, takes 0.3 s (2 cores).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import polars as pl

from polars_llm.store.directory import write_atomic

__all__ = ["INDEX_SCHEMA", "KeyIndex"]

INDEX_SCHEMA: dict[str, pl.DataType] = {
    "key": pl.UInt128(),
    "state": pl.UInt8(),
    "attempt": pl.UInt16(),
    "segment": pl.UInt32(),
    "row": pl.UInt32(),
}


@dataclasses.dataclass(frozen=True, slots=True)
class KeyIndex:
    """Which segments are covered, and their rows sorted by key, one row a key.

    Parameters
    ----------
    segments
        Number -> file name of what is covered. A number means one file for the life of the process:
        what `find` gave stays true when the index is built anew.
    rows
        INDEX_SCHEMA, sorted by key, keys unique.
    """

    segments: Mapping[int, str] = dataclasses.field(default_factory=dict)
    rows: pl.DataFrame = dataclasses.field(default_factory=lambda: pl.DataFrame(schema=INDEX_SCHEMA))

    def extended(self, names: Mapping[int, str], parts: Sequence[pl.DataFrame]) -> KeyIndex:
        """With more segments; `parts` hold their key, state, attempt, in the order of the rows."""
        numbered = [
            part.with_row_index("row").with_columns(pl.lit(number, pl.UInt32).alias("segment"))
            for number, part in zip(names, parts, strict=True)
        ]
        rows = pl.concat([self.rows, *(n.select(self.rows.columns) for n in numbered)])
        segments = {**self.segments, **names}
        return KeyIndex(segments, _winners(rows, segments))

    def find(self, keys: pl.Series) -> pl.DataFrame:
        """INDEX_SCHEMA, one row for each of `keys`, in their order; unknown ones have nulls."""
        if self.rows.is_empty():
            nothing = [pl.lit(None, t).alias(n) for n, t in INDEX_SCHEMA.items() if n != "key"]
            return keys.alias("key").to_frame().with_columns(nothing)
        place = self.rows["key"].search_sorted(keys)
        inside = place.clip(upper_bound=self.rows.height - 1)
        near = self.rows[inside]
        hit = near["key"] == keys
        if hit.all(ignore_nulls=False):
            return near
        facts = [pl.when(hit).then(pl.col(n)).alias(n) for n in INDEX_SCHEMA if n != "key"]
        return near.with_columns(keys.alias("key"), *facts)

    def save(self, path: Path) -> None:
        """Write it; losing it costs only the time to build it again."""
        head = msgspec.json.encode({"segments": self.segments})

        def write(file: object) -> None:
            file.write(head + b"\n")  # type: ignore[attr-defined]
            self.rows.write_ipc(file, compression="uncompressed")  # type: ignore[call-overload]

        write_atomic(path, write)

    @classmethod
    def load(cls, path: Path) -> KeyIndex:
        """Read it; whatever is wrong with the file, the answer is an empty index."""
        try:
            head, _, body = path.read_bytes().partition(b"\n")
            segments = msgspec.json.decode(head, type=dict[str, dict[int, str]])["segments"]
            rows = pl.read_ipc(body)
        except (OSError, msgspec.DecodeError, KeyError, UnicodeDecodeError, pl.exceptions.PolarsError):
            return cls()
        sound = (
            rows.schema == pl.Schema(INDEX_SCHEMA)
            and rows["key"].is_sorted()
            and rows["segment"].unique().is_in(list(segments)).all()
        )
        return cls(segments, rows) if sound else cls()


def _winners(rows: pl.DataFrame, segments: Mapping[int, str]) -> pl.DataFrame:
    """One row a key: the best state, then the earliest segment; attempts are the most of all."""
    rows = rows.sort("key")
    if not (rows["key"] == rows["key"].shift()).any():
        return rows
    in_order = sorted(segments, key=lambda number: segments[number])
    written = {number: rank for rank, number in enumerate(in_order)}
    rank = pl.col("segment").replace_strict(written, return_dtype=pl.UInt32)
    most = rows.group_by("key").agg(pl.col("attempt").max())
    best = rows.sort("key", "state", rank, "row").unique("key", keep="first", maintain_order=True)
    return (
        best.drop("attempt")
        .join(most, on="key", how="left", maintain_order="left")
        .select(*INDEX_SCHEMA)
        .sort("key")
    )
