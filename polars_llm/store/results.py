"""The results: every answer ever paid for, as immutable Parquet segments in the order they came.

Any number of processes add and read without talking to each other: a segment is written under a
temporary name, fsynced and renamed, and never changed. The directory is the truth; the index is a cache of
it. Merging writes the merged segment before it removes those that it replaces, so every answer is in at
least one segment at any time, and it doesn't matter that for a moment it is in two.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from polars_llm.errors import CacheCorrupt, CacheError
from polars_llm.store import index as key_index
from polars_llm.store import locks, segment
from polars_llm.store.directory import os_errors, sync_directory
from polars_llm.store.indexed import GONE, IndexedResults, View, check_answers, check_columns

__all__ = ["ParquetResults", "ResultStore"]


class ResultStore(Protocol):
    """Answers by key. `tests/store/results_contract.py` says the same as a test suite."""

    def add(self, answers: pl.DataFrame) -> None:
        """Keep answers: durable on return, and all of them or none.

        Parameters
        ----------
        answers
            Columns of ANSWER_SCHEMA. A key may come more than once, and may be known already.
        """

    def find(self, keys: pl.Series) -> pl.DataFrame:
        """Look keys up in everything that was durable when `find` was called.

        Of several answers for one key the lowest state counts, then the one written first.

        Parameters
        ----------
        keys
            UInt128: the first 16 bytes of each key, big-endian. May hold duplicates and nulls.

        Returns
        -------
        DataFrame
            One row for each of `keys`, in their order: ``key``; ``state``, null if unknown;
            ``attempt``, the highest of that key; ``segment`` and ``row``, for `read`.

        Raises
        ------
        CacheCorrupt
            Something is damaged, so that nobody can say what was paid for.
        """

    def read(self, found: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
        """Columns of the answers that `find` found.

        Parameters
        ----------
        found
            What `find` returned, or rows of it; where ``segment`` is null the answer is all null.
        columns
            Names of ANSWER_SCHEMA.
        """

    def scan(self) -> pl.LazyFrame:
        """Everything, one answer for each key."""

    def compact(self) -> None:
        """Tidy up, if it pays by now; cheap if not. Never raises because of what it finds."""


_INDEX = "keys.index"
_LOCK = ".compact.lock"
# The index file is written again when so many rows, and this share of them, are not in it: reading them
# from the segments takes 0.2 s for each million.
_UNSAVED_ROWS = 50_000
_UNSAVED_SHARE = 0.1
# How long somebody waits for another thread that reads the same new segments. A thread of Polars' pool that
# waits for part of a query runs other work meanwhile, such as a function that asks this store: in the same
# thread (hence a re-entrant lock), or in another, which the first one may be waiting for (hence an end).
_PATIENCE_S = 2.0
# How long segments that are merged away under a reader are looked for again. Every look brings it nearer.
_RESTLESS_S = 30.0
# One byte for each time that merged segments are about to be removed: it tells a listing that some of what
# it did not see may have gone while it was looking, and where it went it had looked already.
_REMOVALS = ".removals"


class ParquetResults(IndexedResults):
    """A directory of Parquet segments.

    Parameters
    ----------
    directory
        Need not exist: `add` makes it. ``pl.scan_parquet(directory / "*.parquet")`` reads it as well; there
        a key that was answered more than once has all its rows.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = Path(directory)
        self._view: View | None = None
        self._refreshing = threading.RLock()
        self._left_alone: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._directory,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._directory)!r})"

    def add(self, answers: pl.DataFrame) -> None:
        """See `ResultStore`."""
        check_answers(answers)
        if answers.is_empty():
            return
        with os_errors(self._directory):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        segment.write(self._directory, answers, self._listed)

    def read(self, found: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
        """See `ResultStore`."""
        check_columns(columns)
        deadline = time.monotonic() + _RESTLESS_S
        while True:
            try:
                return self._read(found, list(columns))
            except FileNotFoundError:
                pass
            except segment.Moved:
                self._view = None
            self._not_for_ever(deadline)
            found = self._found_again(found)

    def compact(self) -> None:
        """See `ResultStore`."""
        if not segment.unfinished(self._listed()) and not self._due():
            return
        # A disk that is full or read-only is said by `add`, when it matters. Windows does not remove what
        # somebody reads. Tidying can wait.
        with contextlib.suppress(OSError, CacheError), locks.try_hold(self._directory / _LOCK) as ours:
            if not ours:
                return
            self._finish_merges()
            while names := self._due():
                if not self._merge(names):
                    return

    # --- reading ---------------------------------------------------------------------------------------

    def _fetched(self, hits: pl.DataFrame, columns: Sequence[str]) -> tuple[pl.DataFrame, pl.Series]:
        parts = [self._take(part, columns) for part in _by_span(hits)]
        return pl.concat(parts), hits["position"]

    def _take(self, hits: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
        number = int(hits["place"][0]) >> 32
        if number >= len(self._names):
            raise segment.Moved(str(number))
        rows = (hits["place"] - (number << 32)).cast(pl.UInt32)
        return segment.take(self._directory / self._names[number], rows, hits["key"], columns)

    def _found_again(self, found: pl.DataFrame) -> pl.DataFrame:
        known = found["segment"].is_not_null()
        again = self.find(found["key"])
        lost = known & again["segment"].is_null()
        if lost.any():
            raise CacheCorrupt(
                f"{lost.sum():,} answers were removed from {self._directory} while they were read.",
                path=str(self._directory),
                hint="put the files back, or read the answers back from the provider with"
                " pllm.recover('openai') (or 'anthropic'). Nothing was sent.",
            )
        return again.with_columns(
            pl.when(known).then(pl.col(name)).alias(name) for name in ("segment", "row")
        )

    def _not_for_ever(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise CacheError(
                f"The segments in {self._directory} are replaced faster than they can be read.",
                path=str(self._directory),
                hint="run the same line again. Nothing was sent.",
            )

    # --- what is there ---------------------------------------------------------------------------------

    def _listed(self) -> frozenset[str]:
        """Names of the segments on disk now."""
        with os_errors(self._directory):
            return self._listed_now()

    def _listed_now(self) -> frozenset[str]:
        deadline = time.monotonic() + _RESTLESS_S
        while True:
            before = self._removals()
            try:
                with os.scandir(self._directory) as listing:
                    names = frozenset(
                        entry.name
                        for entry in listing
                        if entry.name.endswith(segment.SUFFIX) and entry.is_file()
                    )
            except FileNotFoundError:
                return frozenset()
            # A long directory is not listed in one moment: a merged segment may come behind the cursor, and
            # what it replaces may go before it.
            if self._removals() == before:
                return names
            self._not_for_ever(deadline)

    def _removals(self) -> int:
        try:
            return (self._directory / _REMOVALS).stat().st_size
        except FileNotFoundError:
            return 0

    def _stamps(self) -> dict[str, str]:
        """Size and time of change of the segments on disk now."""
        stamps = {}
        for name in self._listed():
            with contextlib.suppress(FileNotFoundError):
                status = (self._directory / name).stat()
                stamps[name] = f"{status.st_size} {status.st_mtime_ns}"
        return stamps

    def _current(self) -> View:
        """The index over all that is on disk now. Cheap if that is what it was."""
        names = self._listed()
        view = self._view
        if view is not None and view.names == names:
            return view
        # Whoever waited in vain does the same work for itself.
        ours = self._refreshing.acquire(timeout=_PATIENCE_S)
        try:
            return self._refreshed()
        finally:
            if ours:
                self._refreshing.release()

    def _refreshed(self) -> View:
        deadline = time.monotonic() + _RESTLESS_S
        while True:
            names = self._listed()
            view = self._view or self._loaded()
            if view.names != names:
                view = self._extended(view, names)
            self._view = view
            if view.names == names:
                self._view = view = self._saved(view)
                return view
            # Some were merged since they were listed: those that were read stay, and it is listed again.
            self._not_for_ever(deadline)

    def _extended(self, view: View, names: frozenset[str]) -> View:
        """The view of `names`, or on the way there if some are gone by now."""
        entries, read = self._entries(sorted(names - view.names))
        complete = read >= names - view.names
        known = names if complete else view.names | read
        ranks = self._ranks(known)
        index, unsaved = view.index, view.unsaved
        if read:
            index, unsaved = index.extended(entries, ranks), unsaved + entries.height
        if complete and not view.names <= names:
            index = index.merged()
            if index.runs and (ranks.gather(index.runs[0]["segment"].unique()) == GONE).any():
                # Taken away rather than merged: what those rows had hidden counts again.
                return self._extended(View(), names)
        return View(known, index, unsaved)

    def _entries(self, names: Sequence[str]) -> tuple[pl.DataFrame, frozenset[str]]:
        """What the index keeps of those segments, and which of them were still there."""
        entries, read = [], []
        for number, name in self._numbered(names).items():
            with contextlib.suppress(FileNotFoundError):
                entries.append(segment.entries(self._directory / name, number))
                read.append(name)
        return pl.concat(entries) if entries else pl.DataFrame(), frozenset(read)

    def _loaded(self) -> View:
        loaded = None if self._names else key_index.load(self._directory / _INDEX)
        if loaded is None:
            return View()
        index, covered = loaded
        now = self._stamps()
        # A segment is never changed; if one was, nothing that was noted about it is believed.
        if any(now.get(name, stamp) != stamp for name, stamp in covered):
            return View()
        with self._naming:
            if self._names:
                return View()
            self._names = [name for name, _ in covered]
        return View(frozenset(self._names), index)

    def _saved(self, view: View) -> View:
        if view.unsaved < max(_UNSAVED_ROWS, _UNSAVED_SHARE * view.index.height):
            return view
        index = view.index.merged()
        stamps = self._stamps()
        covered = [(name, stamps.get(name, "")) for name in list(self._names)]
        # A directory that is full or cannot be written has no index: that costs time only.
        with contextlib.suppress(CacheError, OSError):
            key_index.save(self._directory / _INDEX, index, covered)
        return View(view.names, index)

    # --- merging ---------------------------------------------------------------------------------------

    def _due(self) -> list[str]:
        sizes = {name: int(stamp.split()[0]) for name, stamp in self._stamps().items()}
        return segment.due(sizes, self._left_alone)

    def _merge(self, names: Sequence[str]) -> bool:
        """Did anything come of it that makes another look worth while?"""

        def still_neighbours() -> bool:
            between = [name for name in self._listed() if names[0] <= name <= names[-1]]
            return sorted(between) == list(names)

        try:
            segment.merge(self._directory, names, still_neighbours)
        except (segment.Moved, FileNotFoundError):
            return False
        except CacheCorrupt:
            # Reading it says so, to those who need it. Here it is only no longer touched.
            self._left_alone.update(names)
            return True
        self._remove(names)
        return True

    def _finish_merges(self) -> None:
        """Remove what a process left that died after it had written the merged segment."""
        for name in segment.unfinished(self._listed()):
            with contextlib.suppress(FileNotFoundError):
                self._remove(segment.replaced(self._directory / name))

    def _remove(self, names: Sequence[str]) -> None:
        sync_directory(self._directory)  # the merged segment comes first
        with (self._directory / _REMOVALS).open("ab", buffering=0) as file:
            file.write(b".")
        # The first one goes last: that it is there tells that a merge was not finished.
        for name in reversed(names):
            (self._directory / name).unlink(missing_ok=True)


def _by_span(hits: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Sorted by place: one part for each span of a segment."""
    start = 0
    for length in (hits["place"] // segment.SPAN).rle().struct.field("len"):
        yield hits.slice(start, length)
        start += length
