"""What every results store with a key index does alike: look up, put rows in the order asked for, scan.

Where the segments lie, and how rows of them are read, is the affair of `ParquetResults` and
`SharedResults`.
"""

from __future__ import annotations

import abc
import dataclasses
import threading
from collections.abc import Iterator, Sequence

import polars as pl
from polars.io.plugins import register_io_source

from polars_llm.answer import ANSWER_SCHEMA, RETRY
from polars_llm.store.index import INDEX_SCHEMA, KeyIndex

__all__ = ["GONE", "IndexedResults", "View", "check_answers", "check_columns"]

_SCAN_ROWS = 1 << 16
GONE = 2**32 - 1
"""The rank of a segment that is not there any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """The segments that were there at some moment, and the index of their keys."""

    names: frozenset[str] = frozenset()
    index: KeyIndex = dataclasses.field(default_factory=KeyIndex)
    unsaved: int = 0


class IndexedResults(abc.ABC):
    """Looking up and scanning, over segments that have numbers."""

    def __init__(self) -> None:
        # Names by number, of every segment ever seen: a number never changes its meaning. Guarded by a lock
        # that is never held while Polars works.
        self._names: list[str] = []
        self._naming = threading.Lock()

    @abc.abstractmethod
    def _current(self) -> View:
        """The index over all that is there now. Cheap if that is what it was."""

    @abc.abstractmethod
    def _fetched(self, hits: pl.DataFrame, columns: Sequence[str]) -> tuple[pl.DataFrame, pl.Series]:
        """The rows at ``place`` (``segment << 32 | row``, ascending), and the ``position`` of each.

        Raises
        ------
        FileNotFoundError
            A segment is gone.
        Moved
            Those rows do not hold those keys.
        """

    @abc.abstractmethod
    def read(self, found: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
        """See `ResultStore`."""

    def find(self, keys: pl.Series) -> pl.DataFrame:
        """See `ResultStore`."""
        if keys.dtype != pl.UInt128:
            raise TypeError(f"keys are UInt128, not {keys.dtype}")
        return self._current().index.find(keys)

    def scan(self) -> pl.LazyFrame:
        """See `ResultStore`."""

        def source(
            with_columns: list[str] | None,
            predicate: pl.Expr | None,
            n_rows: int | None,
            batch_size: int | None,  # noqa: ARG001 (a batch is what is read together)
        ) -> Iterator[pl.DataFrame]:
            columns = list(ANSWER_SCHEMA) if with_columns is None else with_columns
            for found in self._batches(n_rows):
                rows = self.read(found, columns)
                yield rows if predicate is None else rows.filter(predicate)

        # Damage is said here: what is raised in a source comes out of Polars 1 as a ComputeError.
        self._current()
        return register_io_source(source, schema=dict(ANSWER_SCHEMA))

    def _batches(self, n_rows: int | None) -> Iterator[pl.DataFrame]:
        """Where everything is, in written order; at least one batch, so that an empty store has columns."""
        view = self._current()
        ranks = self._ranks(view.names)
        runs = view.index.merged().runs
        where = runs[0].select("key", "segment", "row") if runs else pl.DataFrame(schema=INDEX_SCHEMA)
        where = where.with_columns(rank=ranks.gather(where["segment"])).sort("rank", "row").drop("rank")
        where = where if n_rows is None else where.head(n_rows)
        for start in range(0, max(where.height, 1), _SCAN_ROWS):
            yield where.slice(start, _SCAN_ROWS)

    def _read(self, found: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
        """Those columns, one row for each of `found`; what is raised is what `_fetched` raises."""
        schema = {name: ANSWER_SCHEMA[name] for name in columns}
        place = pl.col("segment").cast(pl.UInt64) * 2**32 + pl.col("row")
        hits = found.select("key", place.alias("place")).with_row_index("position")
        if hits["place"].has_nulls():
            hits = hits.drop_nulls("place")
        if not hits["place"].is_sorted():
            hits = hits.sort("place")
        if hits.is_empty():
            return pl.DataFrame(schema=schema).clear(found.height)
        return _in_order(*self._fetched(hits, columns), found.height)

    def _numbered(self, names: Sequence[str]) -> dict[int, str]:
        with self._naming:
            numbers = {name: number for number, name in enumerate(self._names)}
            for name in names:
                if name not in numbers:
                    numbers[name] = len(self._names)
                    self._names.append(name)
        return {numbers[name]: name for name in names}

    def _ranks(self, names: frozenset[str]) -> pl.Series:
        """By number, the place in the written order; those that are gone come last."""
        written = {name: rank for rank, name in enumerate(sorted(names))}
        return pl.Series([written.get(name, GONE) for name in list(self._names)], dtype=pl.UInt32)


def check_answers(answers: pl.DataFrame) -> None:
    """Raise ValueError if these are no answers that could be kept."""
    if answers.schema != pl.Schema(ANSWER_SCHEMA):
        wrong = set(answers.schema.items()) ^ set(ANSWER_SCHEMA.items())
        raise ValueError(f"answers do not have ANSWER_SCHEMA: {sorted(map(str, wrong)) or 'other order'}")
    sound = (pl.col("key").bin.size() == 32) & (pl.col("state") <= RETRY) & (pl.col("attempt") >= 1)
    if not answers.select(sound.fill_null(False).all()).item():
        raise ValueError("every answer has a key of 32 bytes, a state and an attempt, 1 or more")


def check_columns(columns: Sequence[str]) -> None:
    """Raise ValueError if answers have no such columns."""
    unknown = [name for name in columns if name not in ANSWER_SCHEMA]
    if unknown:
        raise ValueError(f"answers have no columns {unknown}")


def _in_order(answers: pl.DataFrame, positions: pl.Series, height: int) -> pl.DataFrame:
    """Each answer at its position, nulls elsewhere."""
    if positions.len() == height and positions.is_sorted():
        return answers
    source = positions.to_frame().with_row_index("source").sort("position")
    if positions.len() < height:
        everywhere = pl.int_range(height, eager=True).cast(positions.dtype).alias("position").to_frame()
        source = everywhere.join(source, on="position", how="left", maintain_order="left")
    # From one chunk, Polars gathers text without copying it.
    return answers.rechunk().select(pl.all().gather(source["source"]))
