"""The results on a place that several hosts share: an object store, or a directory that they mount.

The place holds immutable segments and nothing else. Each host keeps, on a local disk, an index of the keys
of all segments that it has seen, and extends it by those that a listing shows and it has not seen. There
are no locks, and nothing that was seen is ever forgotten: a file that is missing has been merged, and is
looked for until the listing shows where to; it is never taken for an answer that was not given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from polars_llm.errors import CacheCorrupt, CacheError
from polars_llm.store import index as key_index
from polars_llm.store import locks, segment, shared_segment
from polars_llm.store.directory import os_errors
from polars_llm.store.indexed import IndexedResults, View, check_answers, check_columns
from polars_llm.store.outbox import Outbox
from polars_llm.store.place import Item, Place
from polars_llm.store.shared_segment import Footer

__all__ = ["SharedResults"]

T = TypeVar("T")
R = TypeVar("R")

_INDEX = "keys.index"
_LOCK = ".compact.lock"
# The index file is written again when so many rows, or files, are not in it.
_UNSAVED_ROWS = 50_000
_UNSAVED_SHARE = 0.1
_UNSAVED_FILES = 16
# As in `ParquetResults`.
_PATIENCE_S = 2.0
# How long a listing may lag behind: so long is a missing file looked for.
_LAG_S = 30.0
# A merged segment is so old before those that it replaces are removed: by then everybody's listing has it.
_GRACE_S = 600.0
_AT_ONCE = 8
_FOOTERS = 4_096


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """A file that was listed: its size, and number and rows of its parts. A single part has no rows here."""

    size: int
    parts: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _View(View):
    """What is known: the parts by `names`, and where they lie.

    Parameters
    ----------
    files
        What the last listing showed.
    places
        By number of a part: the file that has it, and its first row there. A part that no listed file
        has stays where it was last.
    unsaved_files
        Files that are not in the index on disk.
    """

    files: Mapping[str, _File] = dataclasses.field(default_factory=dict)
    places: Mapping[int, tuple[str, int]] = dataclasses.field(default_factory=dict)
    unsaved_files: int = 0


class _Gone(Exception):
    """A file is not where a listing showed it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class SharedResults(IndexedResults):
    """Segments at a place that hosts share.

    Parameters
    ----------
    place
        Where they are. ``pl.scan_parquet(f"{place}/results/*.parquet")`` reads them as well; there a key that
        was answered more than once, or that was merged of late, has all its rows.
    local
        A directory of this host, for the index and for answers on their way.
    """

    def __init__(self, place: Place, local: Path) -> None:
        super().__init__()
        self._place = place
        self._local = Path(local)
        self._outbox = Outbox(self._local / "outbox", self._send)
        self._view: _View | None = None
        self._viewed = 0.0
        self._refreshing = threading.RLock()
        self._footers: dict[str, Footer] = {}
        self._missing: dict[str, float] = {}
        self._left_alone: set[str] = set()
        self._merged: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._place, self._local)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._place.name!r}, {str(self._local)!r})"

    def add(self, answers: pl.DataFrame) -> None:
        """See `ResultStore`. Where the place cannot be reached they are durable on this host's disk."""
        check_answers(answers)
        if not answers.is_empty():
            self._outbox.put(shared_segment.encode(answers))

    def read(self, found: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
        """See `ResultStore`."""
        check_columns(columns)
        deadline, pause = time.monotonic() + _LAG_S, 0.05
        while True:
            try:
                return self._read(found, columns)
            except _Gone as gone:
                self._missing[gone.name] = time.monotonic()
                self._give_up(deadline, gone.name)
                self._current()
            except segment.Moved as moved:
                # What another object found has other numbers.
                if time.monotonic() > deadline:
                    self._give_up(0.0, str(moved))
                found = self._found_again(found)
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def compact(self) -> None:
        """See `ResultStore`."""
        # What cannot be tidied is said when it is read. Tidying can wait.
        with contextlib.suppress(OSError, CacheError, _Gone):
            view = self._refresh_now()
            if not self._due(view) and not _covered(view.files):
                return
            with os_errors(self._local):
                self._local.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Another host may do the same at the same time: then both merged segments stay until the
            # next merge. This only keeps the processes of one host from doing it twice.
            with locks.try_hold(self._local / _LOCK) as ours:
                while ours and (names := self._due(view)) and self._merge(view, names):
                    view = self._refresh_now()
                if ours:
                    self._remove_covered(view)

    # --- writing -----------------------------------------------------------------------------------------

    def _send(self, data: memoryview) -> None:
        listed = self._listed()
        name = shared_segment.name_of(data, chain(listed, list(self._names)))
        checksum = name.rpartition("-")[2]
        # Whoever died after writing it had not removed it from the outbox.
        if not any(n.endswith(checksum) and item.size == len(data) for n, item in listed.items()):
            self._place.put(name, data)

    # --- reading ---------------------------------------------------------------------------------------

    def _fetched(self, hits: pl.DataFrame, columns: Sequence[str]) -> tuple[pl.DataFrame, pl.Series]:
        view = self._view
        if view is None:
            raise segment.Moved("nothing was looked up yet")
        by_file: dict[str, list[pl.DataFrame]] = {}
        start = 0
        for length, number in (hits["place"] // 2**32).rle().struct.unnest().iter_rows():
            if number >= len(self._names):
                raise segment.Moved(str(number))
            name, first = view.places.get(number) or (self._names[number], 0)
            row = (pl.col("place") % 2**32 + first).cast(pl.UInt32).alias("row")
            by_file.setdefault(name, []).append(hits.slice(start, length).with_columns(row))
            start += length
        work = [
            (name, head, groups, rows.slice(begin, length))
            for (name, parts), head in zip(by_file.items(), self._heads(list(by_file)), strict=True)
            for rows in [pl.concat(parts).sort("row", maintain_order=True) if len(parts) > 1 else parts[0]]
            for begin, length, groups in shared_segment.chunks(head, rows["row"])
        ]

        def fetch(job: tuple[str, Footer, list[int], pl.DataFrame]) -> Any:
            name, head, groups, _ = job
            with _gone(name):
                return shared_segment.fetch(self._place, name, head, groups, ["key", *columns])

        answers = [
            shared_segment.take(self._place, name, head, groups, table, rows, columns)
            for (name, head, groups, rows), table in zip(work, _together(fetch, work), strict=True)
        ]
        return pl.concat(answers), pl.concat([rows["position"] for *_, rows in work])

    def _heads(self, names: Sequence[str]) -> list[Footer]:
        def head(name: str) -> Footer:
            found = self._footers.get(name)
            if found is None:
                with _gone(name):
                    found = shared_segment.footer(self._place, name)
                if len(self._footers) >= _FOOTERS:
                    self._footers.clear()
                self._footers[name] = found
            return found

        return list(_together(head, names))

    def _found_again(self, found: pl.DataFrame) -> pl.DataFrame:
        again = self.find(found["key"])
        known = found["segment"].is_not_null()
        return again.with_columns(
            pl.when(known).then(pl.col(name)).alias(name) for name in ("segment", "row")
        )

    def _give_up(self, deadline: float, name: str) -> None:
        listed = self._place.listed()
        if listed and time.monotonic() < deadline:
            return
        fact = f"{name} was removed" if listed else "it is not mounted, or all of it was removed"
        raise CacheCorrupt(
            f"Answers that were stored in {self._place.name} are not there any more: {fact}.",
            path=self._place.name,
            hint=f"mount it, or put the files back. If they are lost: remove {self._local}, then"
            " pllm.recover('openai') (or 'anthropic'), in a new process, reads them back from the provider."
            " Nothing was sent.",
        )

    # --- what is there ---------------------------------------------------------------------------------

    def _listed(self) -> dict[str, Item]:
        now = time.monotonic()
        # A listing may show for a while what is removed already.
        self._missing = {name: at for name, at in self._missing.items() if now - at < _GRACE_S}
        return {
            name: item
            for name, item in self._place.listed().items()
            if name.endswith(segment.SUFFIX) and name not in self._missing
        }

    def _current(self) -> _View:
        self._outbox.flush()
        return self._refresh_now()

    def _refresh_now(self) -> _View:
        began = time.monotonic()
        listed = self._listed()
        view = self._view
        if view is not None and view.files.keys() == listed.keys():
            return view
        # Whoever waited in vain does the same work for itself.
        ours = self._refreshing.acquire(timeout=_PATIENCE_S)
        try:
            return self._refreshed(listed, began)
        finally:
            if ours:
                self._refreshing.release()

    def _refreshed(self, listed: dict[str, Item], began: float) -> _View:
        deadline, pause = time.monotonic() + _LAG_S, 0.05
        while True:
            if self._viewed > began:  # somebody has looked later than we did
                began, listed = time.monotonic(), self._listed()
            view = self._view or self._loaded(listed)
            try:
                view = self._extended(view, listed)
            except _Gone as gone:
                # It was merged, and the listing does not show yet where to: nothing is known of its keys.
                if time.monotonic() > deadline:
                    raise CacheError(
                        f"{gone.name} is listed in {self._place.name}, and is not there.",
                        path=self._place.name,
                        hint="run the same line again. Nothing was sent.",
                    ) from gone
                time.sleep(pause)
                pause = min(2 * pause, 2.0)
                began, listed = time.monotonic(), self._listed()
                continue
            self._view = view = self._saved(view)
            self._viewed = began
            return view

    def _extended(self, view: _View, listed: Mapping[str, Item]) -> _View:
        """With what the listing shows and was not known."""
        new = sorted(listed.keys() - view.files.keys())
        unread = [name for name in new if name not in view.names]
        heads = dict(zip(unread, self._heads(unread), strict=True))
        parts = {part for head in heads.values() for part, _ in head.parts} | set(new) - set(unread)
        number_of = {name: number for number, name in self._numbered(sorted(parts)).items()}
        entries = self._entries(heads, number_of, view.names)
        names = view.names | number_of.keys()
        index = view.index.extended(entries, self._ranks(names)) if entries.height else view.index
        files = {name: view.files[name] for name in listed if name in view.files}
        for name in new:
            head = heads.get(name)
            of = [(number_of[part], rows) for part, rows in head.parts] if head else [(number_of[name], 0)]
            files[name] = _File(listed[name].size, tuple(of))
        return _View(
            names,
            index,
            view.unsaved + entries.height,
            files,
            {**view.places, **_places(files)},
            view.unsaved_files + len(new),
        )

    def _entries(
        self, heads: Mapping[str, Footer], number_of: Mapping[str, int], known: frozenset[str]
    ) -> pl.DataFrame:
        """What the index keeps of unknown parts, each read from one of the files that have it."""
        work = []
        seen = set(known)
        for name, head in heads.items():
            wanted = {part: number_of[part] for part, _ in head.parts if part not in seen}
            seen |= wanted.keys()
            if wanted:
                work.append((name, head, wanted))

        def fetch(job: tuple[str, Footer, dict[str, int]]) -> Any:
            name, head, _ = job
            with _gone(name):
                groups = range(len(head.ends))
                return shared_segment.fetch(self._place, name, head, groups, shared_segment.INDEXED)

        found = [
            shared_segment.entries(self._place, name, head, table, wanted)
            for (name, head, wanted), table in zip(work, _together(fetch, work), strict=True)
        ]
        return pl.concat(found) if found else pl.DataFrame()

    def _loaded(self, listed: Mapping[str, Item]) -> _View:
        loaded = None if self._names else key_index.load(self._local / _INDEX)
        if loaded is None:
            return _View()
        index, covered = loaded
        # First the parts, by their numbers, then the files.
        names = [name for name, stamp in covered if not stamp]
        try:
            files = {name: _File(*_parsed(stamp)) for name, stamp in covered if stamp}
        except (ValueError, TypeError):
            return _View()
        # A file is never changed; if one was, nothing that was noted is believed.
        if any(name in listed and listed[name].size != file.size for name, file in files.items()):
            return _View()
        with self._naming:
            if self._names:
                return _View()
            self._names = names
        return _View(frozenset(names), index, 0, files, _places(files))

    def _saved(self, view: _View) -> _View:
        rows = max(_UNSAVED_ROWS, _UNSAVED_SHARE * view.index.height)
        if not view.index.runs or (view.unsaved < rows and view.unsaved_files < _UNSAVED_FILES):
            return view
        index = view.index.merged()
        # Files that are not listed now may be where known parts were last.
        covered = [(name, "") for name in list(self._names)]
        covered += [(name, json.dumps([file.size, file.parts])) for name, file in view.files.items()]
        # A disk that is full or cannot be written has no index: that costs time only.
        with contextlib.suppress(CacheError, OSError):
            self._local.mkdir(mode=0o700, parents=True, exist_ok=True)
            key_index.save(self._local / _INDEX, index, covered)
        return dataclasses.replace(view, index=index, unsaved=0, unsaved_files=0)

    # --- merging ---------------------------------------------------------------------------------------

    def _due(self, view: _View) -> list[str]:
        covered = _covered(view.files)
        sizes = {name: file.size for name, file in view.files.items() if name not in covered}
        return segment.due(sizes, self._left_alone)

    def _merge(self, view: _View, names: Sequence[str]) -> bool:
        """Did anything come of it that makes another look worth while?"""
        try:
            heads = dict(zip(names, self._heads(names), strict=True))
            name, data = shared_segment.merged(self._place, heads)
        except (_Gone, FileNotFoundError):
            return False
        except CacheCorrupt:
            # Reading it says so, to those who need it. Here it is only no longer touched.
            self._left_alone.update(names)
            return True
        if name in view.files or name in self._merged:
            return False  # the listing lags, or somebody else has done it
        self._place.put(name, data)
        self._merged.add(name)
        return True

    def _remove_covered(self, view: _View) -> None:
        ages = {name: item.age for name, item in self._listed().items()}
        for name, by in _covered(view.files).items():
            if ages.get(by, 0.0) < _GRACE_S or name not in ages:
                continue
            # It is read once more, not remembered: what it replaces is about to go.
            now = {part for part, _ in shared_segment.footer(self._place, by).parts}
            if {self._names[number] for number, _ in view.files[name].parts} <= now:
                self._place.remove(name)


def _places(files: Mapping[str, _File]) -> dict[int, tuple[str, int]]:
    """Where each part lies: of several files that have it, the one with the most parts."""
    places = {}
    for name, file in sorted(files.items(), key=lambda item: (len(item[1].parts), item[0])):
        start = 0
        for number, rows in file.parts:
            places[number] = (name, start)
            start += rows
    return places


def _covered(files: Mapping[str, _File]) -> dict[str, str]:
    """Files that may go, each with one that has all its parts.

    Of two with the same parts only the later name may go, so that two hosts never each remove the
    one because of the other.
    """
    holders: dict[int, list[str]] = {}
    for name, file in files.items():
        for number, _ in file.parts:
            holders.setdefault(number, []).append(name)
    covered = {}
    for name, file in files.items():
        of = {number for number, _ in file.parts}
        for other in holders[min(of)] if of else ():
            others = {number for number, _ in files[other].parts}
            if other != name and of <= others and (of != others or other < name):
                covered[name] = other
                break
    return covered


def _parsed(stamp: str) -> tuple[int, tuple[tuple[int, int], ...]]:
    size, parts = json.loads(stamp)
    return int(size), tuple((int(number), int(rows)) for number, rows in parts)


def _together(call: Callable[[T], R], work: Sequence[T]) -> Iterator[R]:
    """Several at once, for most of the time of each is waiting. Nothing in `call` may be work for Polars:
    its threads may all be waiting for this.
    """
    if len(work) < 2:
        yield from map(call, work)
        return
    with ThreadPoolExecutor(min(_AT_ONCE, len(work))) as pool:
        yield from pool.map(call, work)


@contextlib.contextmanager
def _gone(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise _Gone(name) from error
